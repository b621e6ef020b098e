"""An out-of-tree SGLang platform for machines without an accelerator, with bit-identical greedy decoding."""

# Importing SGLang loads platform.py through the entry point. If a module of this package came first, the two would
# import each other half finished.
import sglang  # noqa: F401
