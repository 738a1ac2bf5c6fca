"""All tests run on one thread and import the helpers beside this file by their name.

pytest puts the folder of a conftest.py on the import path.
"""

import torch

torch.set_num_threads(1)
