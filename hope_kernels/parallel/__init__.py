"""A model over several processes, by engines that exist: PyTorch's FSDP2, and collectives of
torch.distributed.

docs/parallel.md says how to run it, what is exchanged, and what is refused.
"""

from .fsdp import fully_shard_hope as fully_shard_hope
from .sessions import load_session as load_session
from .sessions import save_session as save_session
from .tensor import clip_grad_norm_ as clip_grad_norm_
from .tensor import tensor_parallel as tensor_parallel
from .weights import whole_model as whole_model
