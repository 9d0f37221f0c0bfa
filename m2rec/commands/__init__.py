"""Command lines. What loads PyTorch, pandas or RecBole is imported by the function that needs it.

So --help and a mistake on the command line are answered at once.
"""
