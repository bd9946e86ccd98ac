from hope_kernels.hf import HopeForCausalLM, HopeHFConfig  # noqa: F401
