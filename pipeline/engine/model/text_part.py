"""The class that a checkpoint is read with: of a model that also reads images or sounds, its text part alone.

Many text models are published inside such a model (Mistral Small 3, Gemma 3, Qwen3-VL). Its encoders are built, which
takes no memory while a checkpoint is read, and dropped before their weights would be.
"""

from __future__ import annotations

from typing import Any

# Fields of a config that name the token which stands for an image, a video or a sound in a prompt.
MEDIA_TOKENS = tuple(f"{medium}_token_{kind}" for medium in ("image", "video", "audio") for kind in ("id", "index"))


def model_class(hf_config: Any, trust_remote_code: bool = False) -> Any:
    """Has from_pretrained() and from_config() as AutoModelForCausalLM has, which it is for text models.

    hf_config: a transformers config. Raises ValueError, by these two, where transformers has no causal language model
    of its type.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    mappings: list[Any] = [auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForImageTextToText)]  # type: ignore[attr-defined]
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {})
    if own_code or hf_config.get_text_config() is hf_config:
        return AutoModelForCausalLM
    found = next((mapping[type(hf_config)] for mapping in mappings if type(hf_config) in mapping), None)
    # Some types have a class that is made for the text part alone, from its own config.
    whole = getattr(found, "config_class", None) is type(hf_config)
    return text_part(found) if whole else AutoModelForCausalLM


def text_part(whole: Any) -> Any:
    """A subclass of a transformers model class that has no encoders beside its language model.

    What lies between them (projections into the language model's embeddings) stays: some models use it for text.
    """

    class TextPart(whole):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            dropped = {rf"^{name}\." for name in drop_encoders(self)}
            ignored = getattr(self, "_keys_to_ignore_on_load_unexpected", None)
            self._keys_to_ignore_on_load_unexpected = {*(ignored or ()), *dropped}
            # An encoder may be what keeps the whole from it.
            self._supports_attention_backend = getattr(self.get_decoder(), "_supports_attention_backend", False)

        @classmethod
        def from_config(cls, config: Any, trust_remote_code: bool = False, **kwargs: Any) -> Any:
            return cls._from_config(config, **kwargs)

    # transformers goes by both: for how the checkpoint's names are read, and for whose code it is.
    TextPart.__name__, TextPart.__qualname__, TextPart.__module__ = whole.__name__, whole.__qualname__, whole.__module__
    return TextPart


def drop_encoders(model: Any) -> list[str]:
    """Remove the models inside `model` that are not its language model, nor around or in it; returns their names."""
    from transformers import PreTrainedModel

    kept = model.get_decoder()
    inside = {id(module) for module in kept.modules()}
    dropped: list[str] = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, PreTrainedModel) or id(module) in inside or any(m is kept for m in module.modules()):
            continue
        if not any(name.startswith(f"{other}.") for other in dropped):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, None)
            dropped.append(name)
    return dropped


def media_tokens(hf_config: Any) -> frozenset[int]:
    """Ids of the tokens that stand for images, videos or sounds in a prompt."""
    found = [getattr(hf_config, name, None) for name in MEDIA_TOKENS]
    return frozenset(token for token in found if isinstance(token, int))
