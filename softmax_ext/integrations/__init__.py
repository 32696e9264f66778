"""Other libraries' models with the losses of this package. Importing softmax_ext imports none of these modules.

transformers   one call gives a model of Hugging Face's transformers this package's loss
deferred       logits that are not computed before somebody needs them
"""
