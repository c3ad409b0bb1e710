"""Where hf-quant meets other libraries; the only place that touches their internals."""
