"""Full-batch training of node classifiers on one graph, many seeds in one call.

`config` describes an experiment, `step` trains as pure functions of arrays, `experiment` runs the job, `report`
writes what came out.
"""
