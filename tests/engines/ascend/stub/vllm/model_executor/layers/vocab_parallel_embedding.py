"""The kind of embedding whose loader pads what it reads. No model of the tests has one."""

from __future__ import annotations

import torch


class VocabParallelEmbedding(torch.nn.Module):
    pass
