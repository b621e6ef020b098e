"""What a hook is, and how hooks are checked and installed. The list of all hooks is `plugin.HOOKS`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from sglang_auf import ALGORITHM
from sglang_auf.compat import Seam
from sglang_auf.env import BUNDLED

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
    Seam("sglang.srt.platforms:current_platform.is_out_of_tree", "hooks.registry", ()),
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

    def on_ours(self) -> Self:
        """This hook where the server is one of ours (`is_ours`); on others the target does what it does by itself."""
        assert self.kind != "REPLACE", "there is no original to go back to"
        function = self.function

        @functools.wraps(function)
        def gated(*arguments: Any, **options: Any) -> Any:
            if is_ours():
                return function(*arguments, **options)
            original, *rest = arguments
            return original(*rest, **options) if self.kind == "AROUND" else None  # None changes nothing

        return replace(self, function=gated)


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


def on_cpu_platform() -> bool:
    """Whether SGLang runs on the CPU platform of this plugin."""
    from sglang.srt.platforms import current_platform

    return bool(current_platform.is_out_of_tree()) and type(current_platform).__module__ == "sglang_auf.cpu.platform"


def is_ours() -> bool:
    """Whether the server of this process is one of this project's: it speculates with AUF, runs on the CPU platform, or
    was started by `python -m server`, with `--plain` too, so that both sides of a comparison answer the same requests.

    The plugin may be installed beside other servers of SGLang; their requests are left as SGLang has them.
    """
    return BUNDLED in os.environ or on_cpu_platform() or serves_auf()
