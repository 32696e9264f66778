"""The torch.autograd.Functions around the operators: backward, double backward, forward mode and vmap.

What lies where:

transforms     what all of them need to know of torch.func, forward mode and batched gradients
refusals       what traced code cannot differentiate, and says so
cross_entropy  cross entropy of logits
softmax        softmax and log-softmax
linear         cross entropy of a linear layer's output
compiled       the operators that torch.compile and torch.export see instead of a Function
"""
