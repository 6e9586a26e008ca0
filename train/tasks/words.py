"""Words to spell: from a file, else a built-in list of a few hundred common ones."""

from __future__ import annotations

import random
from pathlib import Path

from gptfast import untrusted
from gptfast.errors import UserError
from train.tasks.task import Where

FILE = "words.txt"  # in the folder of tasks, one word a line; such as words_alpha.txt of dwyl/english-words
LARGEST = 2**24  # bytes of it
TRAIN, TEST = 4000, 1000  # number of examples
COMMON = """
able about above across action actor address adult after again agree alarm album alive allow alone along also always
amount anchor angle animal answer apple april apron arrow artist aspect attic august author autumn avenue awake baby
badge bagel balance balloon banana banner barber barrel basin basket battle beach beaver because become bedroom beetle
before behind belong bench berry better beyond bicycle birthday biscuit bitter blanket blossom board bonus border bottle
bottom branch bread breeze brick bridge bright brother bubble bucket budget buffalo builder bullet bundle butter button
cabbage cabin cactus camel camera candle candy canvas captain carbon career carpet carrot castle cattle ceiling cellar
center cereal chair chalk chapter cheese cherry chicken choice circle circus citizen classic clever climate clock cloud
coffee collar college color comet common copper coral corner cotton couple cousin cradle crater cream credit cricket
crystal culture curtain cushion custom cycle dancer danger daughter debate decade deer defend degree delay dentist
desert design detail diamond dinner doctor dollar dolphin donkey double dragon drawer dream dress driver eagle early
earth effect effort eight elbow elephant eleven empty energy engine enough equal error escape estate evening event
exact example fabric factor family famous farmer father feather fellow fence fiction field fifteen figure filter
finger finish flavor flower follow forest forget fossil fourteen freedom friend frozen future galaxy gallery garage
garden garlic gentle giant ginger giraffe glacier glass glove goose grammar grape grass gravity guitar habit hammer
handle happen harbor harvest hazel heart heaven height helmet hidden history holiday honey horizon horse hospital
hundred hunter idea image improve indeed insect inside island jacket january jelly jewel journey juice jungle kettle
kitchen kitten ladder lady lamp language lantern laptop laughter leather lemon lesson letter level library lightning
little lizard lobster lucky lumber magnet mammal mango maple marble market master matter meadow medal melon memory
metal middle million mineral minute mirror mistake model moment monkey month morning mother motion mountain museum
music mustard narrow nation nature needle neighbor nephew nickel normal notice number object ocean october office onion
orange orbit orchard otter oxygen paddle paper parade parent parrot pattern peanut pebble pencil people pepper person
piano picture pigeon pillow pilot planet plastic pocket poem police potato powder prince problem profit pumpkin puppy
purple puzzle quality quarter question rabbit radio railway rain rattle reason record remember repeat ribbon river
robin robot rocket saddle salad salmon sample school science season second secret seven shadow shelter silver simple
singer sister sketch slipper smooth soccer solid spider spirit spring square squirrel station stomach story strawberry
street stream student summer sunset supper surface sweater system table teacher temple tennis theater thunder ticket
tiger timber tomato tongue travel treasure tunnel turtle twelve umbrella uncle valley vanilla velvet village violin
visitor voyage walnut water weather wedding whisper willow window winter wisdom wonder wooden yellow yogurt zebra
"""


def words(where: Where) -> list[str]:
    path = Path(where.folder) / FILE if where.folder else None
    if path is None or not path.exists():
        return COMMON.split()
    try:
        return untrusted.text(path, LARGEST).split()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({untrusted.reason(error)}); give a text of one word a line") from None


def drawing(split: str, index: int) -> random.Random:
    """Returns the generator of example `index`; train and test use different seeds."""
    return random.Random(f"{split} {index}")
