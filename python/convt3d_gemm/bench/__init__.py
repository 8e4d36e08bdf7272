"""The comparison behind ``convt3d bench``: which algorithm wins for which layer, on this machine.

The parts, in the order in which a run goes through them:

- ``options``: the arguments;
- ``command``: the run from beginning to end;
- ``layers``: the description of one layer, the tables of layers, the presets;
- ``factory`` and ``discovery``: a network from the name of what makes it, and the layers that it calls;
- ``competitors``: the algorithms, by name;
- ``device``: what it is, its cache and memory;
- ``ceilings``: its copy rate and GEMM rate, and the floor that these put under a layer's time;
- ``measure``: one layer through all competitors, which brings together

  - ``inputs``: random tensors in a dtype and a layout,
  - ``reference`` and ``checking``: the right answer in float64, and how far off a result may be,
  - ``timing``: the clock, and taking turns;

- ``network``: a whole network before and after its layers are replaced;
- ``tables``: the results as rows of text, which ``report`` shows on a terminal (the only part that needs ``rich``) and
  ``markdown`` writes; ``record`` writes JSON, ``plot`` a picture (the only part that needs ``matplotlib``).

``targets`` is for the scripts in ``benchmarks/``, which hold single figures against what they must reach.
"""
