"""A model's tokenizer as the `tokenizer.*` keys of GGUF, without transformers.

read_vocabulary         a directory's: tokenizer.model (SentencePiece) or tokenizer.json (byte-level BPE)
vocabulary_from_gguf    a GGUF file's, byte for byte: exact for every model, whatever its tokenizer
extended_vocabulary     a GGUF file's with the tokens that an adapter brings
"""

from converters.vocabulary.comparing import check_same_as_stored, compared_with_directory
from converters.vocabulary.reading import read_vocabulary
from converters.vocabulary.stored import extended_vocabulary, vocabulary_from_gguf
from converters.vocabulary.tokens import Vocabulary

__all__ = [
    "Vocabulary",
    "check_same_as_stored",
    "compared_with_directory",
    "extended_vocabulary",
    "read_vocabulary",
    "vocabulary_from_gguf",
]
