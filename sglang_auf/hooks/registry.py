"""What a hook is, and how hooks are checked and installed. The list of all hooks is `plugin.HOOKS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

from sglang_auf import ALGORITHM
from sglang_auf.compat import Seam

SEAMS = (
    Seam(
        "sglang.srt.plugins.hook_registry:HookRegistry.register",
        "hooks.registry",
        ("target", "hook", "hook_type", "source"),
    ),
    *(
        Seam(f"sglang.srt.plugins.hook_registry:HookType.{kind}", "hooks.registry")
        for kind in ("BEFORE", "AFTER", "AROUND", "REPLACE")
    ),
    Seam("sglang.srt.runtime_context:get_spec", "hooks.registry", ()),
)

# Functions of SGLang that several modules hook.
HANDLE_REQUEST = "sglang.srt.entrypoints.openai.serving_base:OpenAIServingBase.handle_request"
SEND_REQUEST = "sglang.srt.managers.tokenizer_manager:TokenizerManager._send_one_request"
RECEIVE_BATCH = "sglang.srt.managers.tokenizer_manager:TokenizerManager._handle_batch_output"

Kind = Literal["BEFORE", "AFTER", "AROUND", "REPLACE"]


@dataclass(frozen=True, slots=True)
class Hook:
    """A function of ours on a function of SGLang's.

    target: "module:qualified.name" of SGLang's function. kind: what SGLang does with ours (plugins/hook_registry.py):
    BEFORE is called with the same arguments, AFTER with the result and the arguments, AROUND with the original function
    and the arguments, REPLACE in its place. function: ours. parameters: the names that the target must take, in order.
    """

    target: str
    kind: Kind
    function: Callable[..., Any]
    parameters: tuple[str, ...]

    @classmethod
    def on(cls, seam: Seam, kind: Kind, function: Callable[..., Any]) -> Self:
        """A hook on a function whose row must be checked before the module of `function` can be imported."""
        return cls(seam.target, kind, function, seam.parameters or ())

    @property
    def seam(self) -> Seam:
        """The row to check before this hook is installed."""
        return Seam(self.target, self.function.__module__.removeprefix("sglang_auf."), self.parameters)


_installed: set[Hook] = set()


def install(hooks: Iterable[Hook]) -> None:
    """Give the hooks to SGLang, which applies them after the last plugin. A hook is installed once per process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        if hook not in _installed:
            HookRegistry.register(hook.target.replace(":", "."), hook.function, HookType[hook.kind])
            _installed.add(hook)


def serves_auf() -> bool:
    """Whether the server of this process speculates with AUF. SGLang's configuration must be published."""
    from sglang.srt.runtime_context import get_spec

    return bool(get_spec().speculative_algorithm == ALGORITHM)
