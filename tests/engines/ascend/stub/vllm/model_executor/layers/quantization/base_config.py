"""What post-processes a layer's weights."""

from __future__ import annotations

import torch


class QuantizeMethodBase:
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        raise NotImplementedError
