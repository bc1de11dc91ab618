# Written by docs/generate.py from the settings classes: change those, not this file.
from typing import Any

from clead.attacks.eot import expectation as expectation
from clead.attacks.external import external as external
from clead.attacks.functions import apgd as apgd
from clead.attacks.functions import cw as cw
from clead.attacks.functions import deepfool as deepfool
from clead.attacks.functions import eot_pgd as eot_pgd
from clead.attacks.functions import fab as fab
from clead.attacks.functions import fgsm as fgsm
from clead.attacks.functions import fmn as fmn
from clead.attacks.functions import mi_fgsm as mi_fgsm
from clead.attacks.functions import patch as patch
from clead.attacks.functions import pgd as pgd
from clead.attacks.functions import pgd_cd as pgd_cd
from clead.attacks.functions import rays as rays
from clead.attacks.functions import spatial as spatial
from clead.attacks.functions import square as square
from clead.registry import Registry

ATTACKS: Registry[Any]
OBJECTIVES: Registry[Any]
UNRESTRICTED: Registry[Any]
