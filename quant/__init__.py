"""Convert and quantize. Imports formats, storage and kernels' building blocks; the engine never imports this."""
