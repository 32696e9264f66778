"""The torch.autograd.Functions around the operators: backward, double backward, forward mode and vmap.

The modules:

transforms     helpers of all Functions for torch.func, forward mode and batched gradients
refusals       exceptions for the derivatives that traced code cannot have
cross_entropy  cross entropy of logits
softmax        softmax and log-softmax
linear         cross entropy of a linear layer's output
compiled       the operators that torch.compile and torch.export see instead of a Function
"""
