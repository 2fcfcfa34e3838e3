"""Repair: an adapter that acts only where its model would not refuse, without training and without a base model.

With H (tokens, in) the inputs of a weight in the aligned model that reads harmful prompts and refuses, G those in the
model with the adapter that reads harmless prompts and answers, C = X^T X / tokens:

    A' = A (C_G + eps I) (C_G + eps I + mu C_H)^-1

B, rank and scaling stay. `token_sets` and `capturing` read the inputs, `closed_form` and `solving` solve, `making`
makes adapters of it, `choosing` finds mu, `measuring` measures; `request` is the whole course.
"""

from safelora_gguf.repair.report import RepairReport
from safelora_gguf.repair.request import prepare_repair, repair_adapter

__all__ = ["RepairReport", "prepare_repair", "repair_adapter"]
