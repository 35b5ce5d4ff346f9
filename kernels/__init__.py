"""The arithmetic on the device: sampling from the teacher's distribution, and the student's loss.

    sampling/    logits [N, V] -> systematic samples or the top k, with the label's logprob   (teacher's side)
    sparse_kl/   hidden [N, H], head [V, H], targets [N, K] -> loss and gradients              (student's side)

Each operation has a plain reference beside the fast form, with one signature. Imports no other part of capgap.
"""

# capgap imports this folder as `capgap.kernels`. Under the bare name it is met only where the repository's root is on
# sys.path, as it is for `python` started there, and where Hugging Face's package `kernels` is meant.
if __name__ == "kernels":

    def _hand_over(name: str) -> None:
        """Put the installed package of that name, if there is one, in the place of this folder.

        If there is none, the name stands for an empty module without a version. It does not raise: transformers, which
        finds this folder and no distribution, imports it to ask for its version, and would fail as a whole.
        """
        import sys
        from importlib.util import module_from_spec
        from pathlib import Path

        # any checkout of capgap, or two of them would hand over to each other for ever
        elsewhere = [entry for entry in sys.path if not Path(entry, "kernels", "sparse_kl").is_dir()]
        found = (finder.find_spec(name, elsewhere) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None:
            return
        module = module_from_spec(spec)
        sys.modules[name] = module  # `import` gives what stands here when this file has run
        if spec.loader is not None:
            spec.loader.exec_module(module)

    __path__ = []  # nothing of capgap is imported a second time under this name
    _hand_over(__name__)
