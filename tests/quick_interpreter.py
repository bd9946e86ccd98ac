"""Triton's interpreter without a third of its time, by three things it makes again and again; what kernels
compute is untouched.

It prepares triton.language for every call of a device function, where once a launch does; it looks up a
type's NumPy type in a table that it makes for the purpose; and it spells out the type of every tensor's
shape.
"""

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
    interpreter._get_np_dtype = kept(interpreter._get_np_dtype, lambda kind: kind.name)
    language.core._type_for_tuple_values = kept(language.core._type_for_tuple_values, of_integers)


def kept(make, key_of):
    """``make``, whose results are kept by a key of its arguments; a key of None keeps nothing."""
    known = {}

    def result(*given):
        key = key_of(*given)
        if key is None:
            return make(*given)
        if key not in known:
            known[key] = make(*given)
        return known[key]

    return result


def of_integers(values, fields=None) -> tuple[int, ...] | None:
    """The numbers of an unnamed tuple that holds nothing else, as shapes do."""
    numbers = tuple(v.value if type(v) is language.core.constexpr else v for v in values)
    return numbers if fields is None and all(type(n) is int for n in numbers) else None
