"""The numbers of the activations, as every kernel knows them: Triton's, C++'s and CUDA's."""

ACTIVATION_CODES = {"gelu_tanh": 0, "gelu": 1, "silu": 2}
