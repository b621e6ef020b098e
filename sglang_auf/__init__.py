"""SGLang plugin that serves any target losslessly with an AUF-trained block drafter (arXiv 2607.01893)."""

__version__ = "0.1.0"
