"""Convert and quantize. Imports storage, kernels.jit, text.tokenizer and errors; the engine never imports this."""
