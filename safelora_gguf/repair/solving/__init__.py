"""From captured inputs to new A: `solver` goes through an adapter's modules, `closed_form` is the mathematics.

`input_rows` brings rows and weights together, `lower_triangles` multiplies, `pair_store` keeps what was solved.
"""
