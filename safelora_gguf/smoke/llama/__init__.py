"""The child's side: llama.cpp, asked through llama-cpp-python's low-level functions.

    child             reads requests, writes replies (`protocol`)
    engine            a loaded model: answers, continuations, recorded distributions, divergences, captured inputs
    decoding, context, batch   many sequences through one context
    sequences, readers   what is done with each of them
    distributions     next-token distributions in a file, and their divergence; numpy alone
    capturing         what weights are multiplied with, into a file
    weight_inputs     how that is found in llama.cpp's graph
    kept_rows         which rows of it
    weight_check      whether it is what was multiplied
    ggml_tensors      tensors in llama.cpp's memory
    capture_file      the file; numpy alone
    model             weights and vocabulary
    chat, template_sandbox   chats to text

Only the child process imports this; all but `distributions`, `capture_file` and `errors` need llama_cpp.
"""
