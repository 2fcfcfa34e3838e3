"""What a repair reads: which tokens of which prompts, their inputs captured in llama.cpp, and the shares they have.

`capturing` is where it begins; `folds` and `token_sets` choose, `captured_sets` has files made, `captured_rows` reads
them.
"""
