"""Pretrained models by Hub id or folder: safetensors only, nobody's code is run, every failure is one clear line."""

from typing import Any

from torch import nn

from workbench.data.hub import hub_error
from workbench.errors import WorkbenchError


def load_pretrained(cls: Any, id: str, **kw: Any) -> Any:
    """cls.from_pretrained(id, **kw) of a transformers or diffusers class, from the user's cache or the Hub.

    Honours HF_HUB_OFFLINE. Raises WorkbenchError when it is offline and not cached, gated, unknown, or has no
    safetensors weights; and for trust_remote_code, which is never given.
    """
    if kw.get("trust_remote_code"):
        raise WorkbenchError(f"model {id!r}: trust_remote_code is never used here; choose a model its library knows")
    if kw.get("use_safetensors") is False:
        raise WorkbenchError(f"model {id!r}: only safetensors weights are loaded here")
    bases = [base.__name__ for base in cls.__mro__]
    # tokenizers, schedulers and configs have no weights and would keep the word as a setting of theirs
    if issubclass(cls, nn.Module) or "DiffusionPipeline" in bases or "_BaseAutoModelClass" in bases:
        kw["use_safetensors"] = True
    try:
        return cls.from_pretrained(id, **kw)
    except WorkbenchError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise hub_error(id, "model", error) from error
