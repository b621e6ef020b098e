"""An out-of-tree SGLang platform for machines without an accelerator, with bit-identical greedy decoding."""
