"""Triton's interpreter without the quarter of its time that it spends on preparing triton.language again for every call of a device
function: once a launch does. What kernels compute is untouched."""

from functools import cache

try:
    from triton import language
    from triton.runtime import interpreter
except ImportError:
    interpreter = None


def install() -> None:
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # no Triton, or one that works otherwise
        return
    prepared: set[tuple[bool, bool]] = set()  # in this launch; a launch's own scope puts all of it back

    @cache
    def prepares(fn) -> tuple[bool, bool]:
        seen = list(fn.__globals__.values())
        return any(v is language for v in seen), any(v is language.core for v in seen)

    def once_a_launch(fn):
        if prepares(fn) in prepared:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        prepared.add(prepares(fn))
        restore = scope.restore

        def end():
            prepared.clear()
            restore()

        scope.restore = end
        return scope

    interpreter._patch_lang = once_a_launch
