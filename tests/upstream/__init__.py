"""torch's and torchdata's own tests of their loaders, run with ours.

Their files are not part of this repository: get them from the repositories of torch and torchdata, and run

    python -m tests.upstream FOLDER_OR_FILES [--worker-type process] [-- arguments of pytest]

or set AIOLOADER_UPSTREAM to the path. `different.py` says which tests are about what is different here by design.
"""
