"""How softmax_ext's libraries are built; setup.py starts it."""
