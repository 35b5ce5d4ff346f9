"""The arithmetic on the device: sampling from the teacher's distribution, and the student's loss.

    sampling/    logits [N, V] -> systematic samples or the top k, with the label's logprob     (teacher's side)
    sparse_kl/   hidden [N, H], head [V, H], targets [N, K] -> loss and gradients              (student's side)

Each operation has a plain reference beside the fast form, with one signature. Imports no other part of capgap.
"""
