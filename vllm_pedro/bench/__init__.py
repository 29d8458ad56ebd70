"""`vllm-pedro bench`: the backbone, PEDRO and vLLM's own LoRA measured in one run, in turns.

`workloads` says what is asked, `driver` asks it and keeps the times, `figures` turns times into
measures and ratios, `results` keeps them as JSON lines, `report` and `plots` show them. `offline`
and `serving` are the runs. What needs vLLM is in `integration/stepped.py`.
"""
