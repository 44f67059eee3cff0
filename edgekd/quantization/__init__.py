"""From an eager module to integers: capture, placement, calibration, training, conversion."""

import logging

# torchao 0.18 makes torch warn, at import, of a registration that torch 2.14 no longer needs
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
