"""A small language model and a set of documents become the bundle that devices train."""

import logging

# torch 2.13 warns about two of torchao's enums when ExecuTorch imports them: nothing that
# whoever exports a model could act on.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
