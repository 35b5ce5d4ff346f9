"""The numerical operations on the device: sampling from the teacher's distribution, and the student's loss.

    sampling/    logits [N, V] -> systematic samples or the top k, with the label's logprob   (teacher's side)
    sparse_kl/   hidden [N, H], head [V, H], targets [N, K] -> loss and gradients              (student's side)

Each operation has a plain reference implementation with the same signature as the fast one. This package imports no
other part of capgap.
"""

# capgap imports this folder as `capgap.kernels`. Its name is `kernels` only if the repository's root is on sys.path, as
# it is for `python` started there, and a program wants to import Hugging Face's package `kernels`.
if __name__ == "kernels":

    def _hand_over(name: str) -> None:
        """Replace this folder in sys.modules by the installed package of the same name, if there is one.

        If there is none, the name stays an empty module without a version, and nothing is raised: transformers finds
        this folder and imports it to read a version, and an error would make the import of transformers fail.
        """
        import sys
        from importlib.util import module_from_spec
        from pathlib import Path

        # all checkouts of capgap are left out, because two of them would replace each other endlessly
        elsewhere = [entry for entry in sys.path if not Path(entry, "kernels", "sparse_kl").is_dir()]
        found = (finder.find_spec(name, elsewhere) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None:
            return
        module = module_from_spec(spec)
        sys.modules[name] = module  # `import` returns the entry that it finds here after this file has run
        if spec.loader is not None:
            spec.loader.exec_module(module)

    __path__ = []  # so that no module of capgap is imported a second time under this name
    _hand_over(__name__)
