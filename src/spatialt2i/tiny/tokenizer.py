"""One word-level vocabulary for all tiny text encoders, in which frequent phrases are single tokens.

"red circle" and "to the left of" are one token each, as frequent phrases are in superword vocabularies (SuperBPE,
arXiv 2503.13423). That binds a colour to its shape and keeps prompts short; articles and punctuation are dropped.
"""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spatialt2i.tiny.phrases import PHRASES
from spatialt2i.tiny.world import COLOURS, OBJECTS, SCENES, SHAPES

CLIP_LENGTH = 77
SPECIAL = ("<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>", "<|Reward|>")
# "here", "view", "picture", "this" open prompts; the rest is what the language model describes pictures with
_WORDS = ("here", "view", "picture", "this", "is", "sits", "there is", "there", "and", "yes", "no", "user", "assistant",
          "describe", "nothing", "where", "what", "judge", "only", "whether", "objects", "are", "placed", "as", "text",
          "says", "one", "two", "three", "four", "five", "six", "seven", "at", "in", "on", "of")
_ARTICLES = r"\b(?:the|a|an)\s+"


def _plain(phrase: str) -> str:
    return re.sub(_ARTICLES, "", phrase)


def vocabulary() -> list[str]:
    """Every token, special ones first; the position is the id."""
    phrases = [_plain(p) for variants in PHRASES.values() for p in variants]
    numbers = [str(i) for i in range(100)]
    words = [*OBJECTS, *phrases, *(_plain(s) for s in SCENES), *COLOURS, *SHAPES, *_WORDS, *numbers]
    return [*SPECIAL, *dict.fromkeys(words)]


def make_tokenizer(*, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer that stock transformers and diffusers classes save, load and use.

    Args:
        max_length: ``model_max_length``, in tokens.
    """
    tokens = vocabulary()
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(_ARTICLES), "")])
    longest_first = sorted((t for t in tokens if t not in SPECIAL), key=len, reverse=True)
    pattern = "|".join(rf"\b{re.escape(t)}\b" for t in longest_first) + r"|\w+"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokens.index("</s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=max_length, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[3:]), padding_side="right", clean_up_tokenization_spaces=False)
