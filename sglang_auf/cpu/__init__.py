"""An out-of-tree SGLang platform for machines without an accelerator, with bit-identical greedy decoding."""

# SGLang's import loads platform.py through the entry point. Whoever imports a module of this package first would have
# the two import each other half made.
import sglang  # noqa: F401
