"""Twins of the papers' tasks in a few characters each: they need no data and are learned by a model of 100,000 parameters.

Each module says which task it stands for and what of it is kept. A twin's score says nothing about the real task's.

How hard each is was chosen by trials on one thread of a two-core machine, on seeds 0 and 1. Model: Llama, 2 layers,
hidden 64, feed-forward 176, 4 heads, tied embeddings. Base: `pretraining_text`, lines of 40, 1000 steps at 3e-3, batch
40. Each kind alone from the base: AdamW, 1e-3, 400 steps, batch 40, cosine to 10 %, 3 % warm-up, clip 1, weight decay
0.01. Every kind scored 0 before. Score after 150 / 300 / 400 steps, tokens of the longest example, CPU ms a step:

    sums         17  52  74  |  10  65  82     16   13
    programs      5  54  52  |   4 100 100     25   18
    deductions   61  91  95  |  92 100 100     16   12
    strings      90  96  96  |  88  94  94     18   14
    dialogues    96  98  98  |  40  98  99     27   19
    topics       94 100 100  |  94 100 100     18   14
    entailment   52  56  76  |  63 100 100     13   12     three labels: 33 by chance
    spans        62  95  95  |  50  90  92     37   24
    snippets    100 100 100  |  68 100 100     34   22

Several have a phase transition, so seeds differ: programs and entailment stay on a level (what to look up is not found
yet) and then jump. Dialogues do so when the base has not learned to copy: 1, 2, 2 from one such base.
"""
