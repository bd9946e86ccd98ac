"""Triton's interpreter without two thirds of its time, by what it makes again and again, or for nothing; what
kernels compute is untouched.

It prepares triton.language for every call of a device function, where once a launch does; it looks up a
type's NumPy type in a table that it makes for the purpose; it spells out every tensor's shape, its type and
its name; it compares equal shapes for how to broadcast them; and it works out whether a sum of integers
overflows, which it says in debug mode alone. One thing it mends: ``whole_masks``.
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
    quick_shapes()
    quick_semantic()
    whole_masks()
    interpreter._get_np_dtype = kept(interpreter._get_np_dtype, lambda kind: kind.name)
    language.core._type_for_tuple_values = kept(language.core._type_for_tuple_values, of_integers)


def quick_shapes() -> None:
    """What tensors and block types say of a shape is made once; nothing modifies it."""
    core = language.core
    block_of, tensor_of, blocks, tensors = core.block_type.__init__, core.tensor.__init__, {}, {}

    def block(self, element_ty, shape):
        values = shape.values if type(shape) is core.tuple else shape
        key = tuple([v.value if type(v) is core.constexpr else v for v in values])
        if key not in blocks:
            block_of(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, f"<{self.shape}, "
        self.element_ty = element_ty
        self.shape, self.numel, name = blocks[key]
        self.name = f"{name}{element_ty}>"

    def tensor(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in tensors:
            tensor_of(self, handle, type)
            tensors[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[key]

    core.block_type.__init__, core.tensor.__init__ = block, tensor


def quick_semantic() -> None:
    semantic = language.semantic.TritonSemantic
    broadcast, checked = semantic.broadcast_impl_value, semantic.binary_op_sanitize_overflow_impl

    def of_equal_shapes(self, a, b):
        alike = a.type.is_block() and b.type.is_block() and a.type.shape.values == b.type.shape.values
        return (a, b) if alike else broadcast(self, a, b)

    def in_debug_mode(self, *given):
        if self.builder.options.debug or not isinstance(self.builder, interpreter.InterpreterBuilder):
            checked(self, *given)

    semantic.broadcast_impl_value, semantic.binary_op_sanitize_overflow_impl = of_equal_shapes, in_debug_mode


def whole_masks() -> None:
    """A comparison is labelled with its operands' type. Broadcast from a scalar, it becomes an array of that
    type, integers say; as a mask, Triton 3.9 refuses them, where older ones took them as truth values."""
    builder = interpreter.InterpreterBuilder
    splat = builder.create_splat

    def of_its_own_type(self, kind, arg):
        made = splat(self, kind, arg)
        if arg.data.dtype == bool:
            made.data = made.data.astype(bool)
        return made

    builder.create_splat = of_its_own_type


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
