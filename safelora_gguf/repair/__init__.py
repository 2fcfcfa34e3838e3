"""Repair: an adapter that acts only where its model would not refuse, without training and without a base model.

With X the inputs of a weight (tokens, in) and C = X^T X / tokens their second moment:

    C_H   half of it of the aligned model, and half of the model with the adapter, reading the same harmful prompts and
          the aligned model's refusals of them
    C_G   of the model with the adapter, reading harmless prompts and its own answers: task_share of it of its task, the
          rest of other prompts

    A' = A (C_G + eps I) (C_G + eps I + mu C_H)^-1

B, rank and scaling stay.

    reading/     token_sets      which tokens are read, and which of them count
                 folds           which prompts are left out together
                 capturing       has prompts answered, and says what is to be read
                 captured_sets   captures in as many passes as the disk asks for
                 captured_rows   captured rows by prompt, from their files
    solving/     solver          every module, for several mu and folds
                 closed_form     the formula, in token space or input space
                 lower_triangles symmetric products, half of the work
                 input_rows      one weight's inputs as weighted rows
                 pair_store      the solutions, on disk
    files        inputs          model and adapter, checked
                 making          adapters of mu and fold, each made once
                 writing         the output, and what it tells of itself
    measuring    prompt_halves   prompts that calibrate, prompts that judge
                 choosing        which mu
                 measuring       runs, by folds where the same prompts calibrate and judge
    course       request         checks everything, before llama.cpp starts
                 repairing       one repair in one llama.cpp process
                 running         its course: calibrate, read, choose, judge, write
                 repaired        what is asked of it, and what it came to
                 progress        how far it is
    telling      telling         runs and failures, without what was only scratch
                 modules         what became of each weight
                 report, table   as data, as text
"""

from safelora_gguf.repair.report import RepairReport
from safelora_gguf.repair.request import prepare_repair, repair_adapter

__all__ = ["RepairReport", "prepare_repair", "repair_adapter"]
