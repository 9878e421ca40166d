"""What m2-tiny is to know: small tables of words and facts. Data only."""

# fmt: off
# ruff: noqa: SIM905  a split string is a readable list of words

from __future__ import annotations

# name: (sound or "", home, young, colour, food, legs, size rank, kind)
_ANIMALS = """
dog|woof|in a kennel or a house|puppy|brown|meat|4|30|pet
cat|meow|in a house|kitten|black or grey|fish and meat|4|20|pet
cow|moo|in a barn|calf|black and white|grass|4|80|farm animal
horse|neigh|in a stable|foal|brown|grass and hay|4|82|farm animal
sheep|baa|in a fold|lamb|white|grass|4|55|farm animal
goat|bleat|on a farm|kid|white or brown|grass and leaves|4|50|farm animal
pig|oink|in a sty|piglet|pink|almost anything|4|60|farm animal
hen|cluck|in a coop|chick|brown|grain|2|15|farm animal
duck|quack|by a pond|duckling|brown or white|plants and snails|2|16|bird
goose|honk|by a pond|gosling|white|grass|2|22|bird
donkey|hee-haw|in a stable|foal|grey|grass and hay|4|70|farm animal
lion|roar|on the savanna|cub|golden|meat|4|76|wild animal
tiger|roar|in the jungle|cub|orange and black|meat|4|77|wild animal
bear|growl|in a den in the forest|cub|brown|berries, fish and honey|4|78|wild animal
wolf|howl|in a den in the forest|pup|grey|meat|4|52|wild animal
fox|bark|in a den|cub|red|mice and berries|4|28|wild animal
elephant|trumpet|on the savanna|calf|grey|grass and leaves|4|98|wild animal
monkey|chatter|in the trees of the jungle|infant|brown|fruit|2|35|wild animal
mouse|squeak|in a hole|pup|grey|seeds and cheese|4|6|wild animal
rabbit|squeak|in a burrow|kit|brown or white|grass and carrots|4|18|wild animal
frog|croak|in a pond|tadpole|green|flies|4|7|wild animal
owl|hoot|in a hollow tree|owlet|brown|mice|2|17|bird
crow|caw|in a nest in a tree|chick|black|almost anything|2|14|bird
sparrow|chirp|in a nest|chick|brown|seeds|2|5|bird
bee|buzz|in a hive|larva|yellow and black|nectar|6|3|insect
ant||in an anthill|larva|black|seeds and sweet things|6|1|insect
butterfly||in meadows and gardens|caterpillar|many colours|nectar|6|2|insect
spider||in a web|spiderling|black|flies|8|2|small animal
snake|hiss|in holes and grass|snakelet|green or brown|mice|0|25|reptile
turtle||in ponds and the sea|hatchling|green|plants|4|26|reptile
fish||in the water|fry|silver|plants and worms|0|10|sea animal
whale|sing|in the sea|calf|blue or grey|krill|0|100|sea animal
dolphin|click|in the sea|calf|grey|fish|0|75|sea animal
penguin|bray|on the ice and in the sea|chick|black and white|fish|2|29|bird
swan|honk|on a lake|cygnet|white|water plants|2|27|bird
deer|bellow|in the forest|fawn|brown|grass and leaves|4|68|wild animal
squirrel|chatter|in a tree|kit|red or grey|nuts|4|9|wild animal
hedgehog|snuffle|under hedges|hoglet|brown|insects and snails|4|11|wild animal
giraffe|hum|on the savanna|calf|yellow and brown|leaves|4|95|wild animal
camel|grunt|in the desert|calf|light brown|dry plants|4|85|farm animal
crocodile|hiss|in rivers|hatchling|green|meat and fish|4|79|reptile
kangaroo|grunt|in Australia|joey|brown|grass|2|64|wild animal
parrot|squawk|in the jungle|chick|green and red|fruit and nuts|2|13|bird
eagle|scream|in a nest on a cliff|eaglet|brown|fish and small animals|2|24|bird
snail||in gardens|hatchling|brown|leaves|0|2|small animal
crab||on the beach|larva|red|almost anything|8|8|sea animal
seal|bark|by the sea|pup|grey|fish|0|66|sea animal
zebra|bark|on the savanna|foal|black and white|grass|4|81|wild animal
"""
ANIMALS = {r.split("|")[0]: r.split("|")[1:] for r in _ANIMALS.strip().split("\n")}

_COLOURS = """
the sky:blue;grass:green;snow:white;blood:red;the sun:yellow;a banana:yellow;a ripe banana:yellow;a strawberry:red;a lemon:yellow
an orange:orange;a carrot:orange;coal:black;milk:white;chocolate:brown;a tomato:red;a cherry:red;a leaf:green;the sea:blue
a frog:green;a pumpkin:orange;the night:black;sand:yellow;a polar bear:white;a raven:black;a swan:white;an eggplant:purple
a plum:purple;a blueberry:blue;salt:white;sugar:white;honey:golden;gold:yellow;silver:grey;a cloud:white;a cucumber:green
a pea:green;a pine tree:green;bread:brown;coffee:brown;a fire engine:red;a flamingo:pink;a pig:pink;an elephant:grey;a mouse:grey
a crow:black;an egg:white or brown;butter:yellow;a rose:red;a sunflower:yellow;lavender:purple;spinach:green;ink:blue or black
a ripe tomato:red;cheese:yellow;rice:white;wood:brown;a brick:red;a fox:red;a lion:golden;a whale:blue or grey;a bear:brown
"""
COLOURS = dict(p.split(":") for p in _COLOURS.strip().replace("\n", ";").split(";"))

_OPPOSITES = """
hot cold;big small;tall short;fast slow;up down;left right;day night;black white;good bad;happy sad;old young;new old;rich poor;hard soft
wet dry;light dark;heavy light;full empty;open closed;early late;near far;high low;strong weak;loud quiet;clean dirty;thick thin;long short
wide narrow;deep shallow;sweet sour;inside outside;above below;first last;always never;love hate;begin end;win lose;buy sell;give take
push pull;front back;true false;easy difficult;safe dangerous;brave afraid;kind mean;right wrong;awake asleep;alive dead;sharp blunt
smooth rough;warm cool;more less;many few;come go;laugh cry;asleep awake;cheap expensive;friend enemy;summer winter;morning evening
yes no;start stop;before after;beautiful ugly;same different;top bottom;large little;huge tiny;noisy quiet;slow fast;cold hot;dark light
empty full;sad happy;small big;down up;poor rich;late early;low high;weak strong;dirty clean;thin thick;short long;narrow wide
shallow deep;sour sweet;outside inside;below above;last first;never always;end begin;lose win;sell buy;take give;pull push;false true
difficult easy;dangerous safe;night day;white black;bad good;soft hard;dry wet;far near;closed open;right left;quiet loud;young old
"""
OPPOSITES = dict(p.split() for p in _OPPOSITES.strip().replace("\n", ";").split(";"))
del OPPOSITES["right"]
OPPOSITES["right"] = "left"

_CAPITALS = """
France Paris;Germany Berlin;Italy Rome;Spain Madrid;England London;Portugal Lisbon;Greece Athens;Austria Vienna;Poland Warsaw;Norway Oslo
Sweden Stockholm;Denmark Copenhagen;Finland Helsinki;Ireland Dublin;Scotland Edinburgh;Wales Cardiff;Hungary Budapest;Russia Moscow
Ukraine Kyiv;Turkey Ankara;Egypt Cairo;China Beijing;Japan Tokyo;India New-Delhi;Canada Ottawa;Mexico Mexico-City;Brazil Brasilia
Argentina Buenos-Aires;Chile Santiago;Peru Lima;Cuba Havana;Kenya Nairobi;Australia Canberra;New-Zealand Wellington;Thailand Bangkok
Vietnam Hanoi;Indonesia Jakarta;South-Korea Seoul;Iran Tehran;Iraq Baghdad;Morocco Rabat;Nigeria Abuja;Belgium Brussels
the-Netherlands Amsterdam;Switzerland Bern;the-United-States Washington;Iceland Reykjavik;Croatia Zagreb;Romania Bucharest;Bulgaria Sofia
"""
CAPITALS = {a.replace("-", " "): b.replace("-", " ") for a, b in (p.split() for p in _CAPITALS.strip().replace("\n", ";").split(";"))}

CATEGORIES = {
    "fruits": "apple banana orange pear cherry grape lemon plum strawberry peach melon kiwi",
    "vegetables": "carrot potato onion cabbage spinach pea bean tomato cucumber pumpkin",
    "colours": "red blue green yellow orange purple pink black white brown grey",
    "farm animals": "cow sheep pig hen horse goat donkey",
    "wild animals": "lion tiger elephant bear wolf fox giraffe zebra monkey",
    "sea animals": "whale dolphin shark crab seal octopus fish",
    "birds": "owl crow sparrow robin swan eagle parrot duck penguin",
    "insects": "ant bee butterfly fly beetle grasshopper",
    "pets": "dog cat rabbit hamster parrot goldfish",
    "animals": "dog cat horse cow lion bear fox rabbit elephant mouse",
    "flowers": "rose tulip daisy sunflower lily violet",
    "trees": "oak pine birch maple willow apple-tree",
    "days of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January March May June August October December",
    "drinks": "water milk tea coffee juice lemonade",
    "kinds of weather": "sun rain snow wind fog storm",
    "tools": "hammer saw drill screwdriver shovel axe",
    "musical instruments": "piano guitar violin drum flute trumpet harp",
    "clothes": "shirt coat hat shoes trousers dress scarf socks",
    "sports": "football tennis swimming running basketball skiing",
    "countries": "France Germany Italy Spain Japan Brazil Canada Egypt India",
    "capital cities": "Paris London Rome Berlin Madrid Tokyo Cairo Vienna",
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    "parts of the body": "head arm leg hand foot nose ear eye",
    "rooms in a house": "kitchen bathroom bedroom living-room hall cellar",
    "things in a kitchen": "pot pan spoon knife plate cup oven",
    "vehicles": "car bus train bicycle boat aeroplane truck",
    "pieces of furniture": "table chair bed sofa cupboard desk",
    "jobs": "teacher doctor farmer baker painter pilot nurse",
    "shapes": "circle square triangle star rectangle oval",
    "seasons": "spring summer autumn winter",
    "sweet foods": "cake honey chocolate ice-cream biscuit jam",
    "things at school": "book pencil desk board ruler pen",
    "girls' names": "Anna Mia Lily Rosa Clara Nina Ella",
    "boys' names": "Tom Ben Max Leo Finn Oscar Sam",
}

_DEFINITIONS = """
lamp|a thing that gives light
chair|a piece of furniture that you sit on
table|a piece of furniture with a flat top and legs
bed|a piece of furniture that you sleep on
sofa|a long soft seat for several people
cupboard|a piece of furniture in which you keep things
door|a thing that you open to go into a room or a house
window|an opening in a wall with glass that lets in light
roof|the top of a house that keeps out the rain
house|a building where people live
school|a place where children learn
hospital|a place where doctors and nurses care for sick people
library|a place where you can read and borrow books
bakery|a shop where bread and cakes are made and sold
market|a place where people buy and sell things
farm|a place where people keep animals and grow food
garden|a piece of land where flowers and vegetables grow
forest|a large place with many trees
river|a long stream of water that flows to the sea
lake|a large area of water with land all around it
sea|a very large area of salt water
island|a piece of land with water all around it
mountain|a very high hill
desert|a dry place where it almost never rains
volcano|a mountain that can throw out fire and hot rock
bridge|a thing that carries a road over a river
castle|a large strong building where kings and queens lived
lighthouse|a tower with a bright light that shows ships the way
museum|a place where you can look at old or beautiful things
station|a place where trains and buses stop
airport|a place where aeroplanes land and take off
train|a vehicle that runs on rails
bicycle|a vehicle with two wheels and pedals
car|a vehicle with four wheels and an engine
boat|a vehicle that travels on water
ship|a large boat that sails on the sea
aeroplane|a machine with wings that flies through the air
bus|a large vehicle that carries many people
clock|a thing that shows the time
book|a set of pages with words to read
pencil|a tool for writing and drawing
pen|a tool for writing with ink
letter|a message on paper that you send to somebody
map|a drawing that shows where places are
key|a small thing that opens a lock
umbrella|a thing that keeps you dry in the rain
hammer|a tool for hitting nails
saw|a tool for cutting wood
ladder|a thing with steps that you climb up
broom|a tool for sweeping the floor
bucket|a round container with a handle for carrying water
basket|a container made of thin pieces of wood
bottle|a container for drinks, made of glass or plastic
cup|a small container that you drink from
spoon|a tool for eating soup
knife|a tool for cutting
fork|a tool for eating with several points
oven|a hot box in a kitchen for baking bread and cakes
piano|a large musical instrument with black and white keys
guitar|a musical instrument with strings
drum|a musical instrument that you hit
violin|a musical instrument with four strings and a bow
flute|a musical instrument that you blow into
kite|a light toy on a string that flies in the wind
ball|a round toy that you throw or kick
doll|a toy that looks like a person
puzzle|a game with pieces that fit together
teacher|a person who helps others to learn
doctor|a person who helps sick people
baker|a person who makes bread and cakes
farmer|a person who grows food and keeps animals
pilot|a person who flies an aeroplane
sailor|a person who works on a ship
painter|a person who makes pictures
king|a man who rules a country
queen|a woman who rules a country
nurse|a person who cares for sick people
friend|a person whom you like and who likes you
neighbour|a person who lives next to you
family|a group of parents, children and other relatives
bread|a food that is baked from flour and water
cheese|a food that is made from milk
butter|a soft yellow food that is made from cream
honey|a sweet food that is made by bees
cake|a sweet food that is baked from flour, eggs and sugar
soup|a hot food that is cooked with water and vegetables
salad|a cold food made of leaves and vegetables
tea|a hot drink that is made from leaves
coffee|a hot brown drink that is made from beans
milk|a white drink that comes from cows
juice|a drink that is made from fruit
apple|a round fruit that grows on a tree
banana|a long yellow fruit
lemon|a sour yellow fruit
carrot|a long orange vegetable that grows in the ground
potato|a vegetable that grows under the ground
tomato|a soft red fruit that is used as a vegetable
onion|a round vegetable with a strong smell
rain|water that falls from the clouds
snow|soft white ice that falls from the clouds
wind|air that moves
storm|very bad weather with strong wind and rain
cloud|a mass of tiny drops of water in the sky
rainbow|an arch of colours in the sky after the rain
sun|the star that gives us light and warmth
moon|the round body that goes around the Earth and shines at night
star|a small bright light in the night sky that is really a far sun
planet|a large round body that goes around a star
tree|a tall plant with a trunk and branches
flower|the colourful part of a plant
leaf|a flat green part of a plant
seed|a small thing from which a plant grows
nest|a home that a bird builds for its eggs
hive|a home for bees
wing|a part of the body that birds use to fly
computer|a machine that stores and works with information
telephone|a machine that lets you talk with someone far away
camera|a machine that takes pictures
robot|a machine that can move and do work by itself
language model|a program that writes text one piece at a time
mirror|a piece of glass in which you can see yourself
candle|a stick of wax that gives light when it burns
blanket|a warm cover for a bed
pillow|a soft thing for your head when you sleep
soap|a thing for washing your hands
hat|a thing that you wear on your head
coat|a warm thing that you wear over your other clothes
shoe|a thing that you wear on your foot
scarf|a long piece of cloth that you wear around your neck
glove|a thing that keeps your hand warm
birthday|the day on which you were born
holiday|a time when you do not have to work or go to school
dream|a story in your head while you sleep
song|words that are sung to music
story|a tale about people or animals and what happens to them
game|a thing that you play for fun
money|coins and notes that you use to buy things
lantern|a lamp that you can carry with you
compass|a thing with a needle that points to the north
thermometer|a thing that shows how warm it is
"""
DEFINITIONS = dict(r.split("|") for r in _DEFINITIONS.strip().split("\n"))

PLURALS = {
    "mouse": "mice", "child": "children", "man": "men", "woman": "women", "foot": "feet", "tooth": "teeth", "goose": "geese",
    "sheep": "sheep", "fish": "fish", "ox": "oxen", "person": "people", "leaf": "leaves", "knife": "knives", "wolf": "wolves",
    "box": "boxes", "fox": "foxes", "bus": "buses", "dish": "dishes", "city": "cities", "baby": "babies", "lady": "ladies",
    "story": "stories", "cherry": "cherries", "berry": "berries", "tomato": "tomatoes", "potato": "potatoes", "church": "churches",
    "brush": "brushes", "glass": "glasses", "shelf": "shelves", "life": "lives", "deer": "deer", "puppy": "puppies", "family": "families",
    "class": "classes", "peach": "peaches", "country": "countries", "butterfly": "butterflies", "witch": "witches", "kiss": "kisses",
}
RHYMES = """
cat hat bat mat rat;dog fog log frog;cake lake snake make;tree bee sea knee;moon spoon soon noon;star car jar far;house mouse blouse
bear chair hair pear;ball wall tall fall;light night bright kite;ring king sing wing;boat goat coat note;rain train plane chain
fish dish wish;bed red head bread;book cook look hook;sun run fun bun;day play may say;tail snail whale mail;box fox socks rocks
nose rose toes close;hill bill mill pill;snow go slow toe;pan man can fan;flower tower shower hour;door floor four more
bell shell well tell;sky fly pie why;top hop shop stop;ship lip trip chip;blue shoe two zoo;nest best rest west;sand hand land band
"""
RHYME_SETS = [s.split() for s in RHYMES.strip().replace("\n", ";").split(";")]

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SEASONS = ["spring", "summer", "autumn", "winter"]
SEASON_OF = dict(zip(MONTHS, ["winter"] * 2 + ["spring"] * 3 + ["summer"] * 3 + ["autumn"] * 3 + ["winter"], strict=True))
MONTH_DAYS = dict(zip(MONTHS, [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31], strict=True))
SEASON_FACTS = {
    "spring": "the flowers come out|the birds build nests|the trees turn green|it gets warmer after the cold",
    "summer": "it is hottest|people go swimming|the days are longest|children have long holidays",
    "autumn": "the leaves fall|the apples are ripe|the leaves turn red and yellow|birds fly south",
    "winter": "it snows|it is coldest|people build snowmen|the days are shortest|the lakes freeze",
}
SIZES = {
    "ant": 1, "pea": 2, "coin": 3, "egg": 4, "cup": 5, "apple": 5, "book": 6, "hat": 6, "pumpkin": 8, "chair": 12, "door": 20,
    "bed": 22, "car": 40, "bus": 60, "house": 80, "ship": 85, "castle": 90, "mountain": 97, "island": 98, "moon": 99, "sun": 100,
}
SPELL = (
    "cat dog house garden apple water friend school flower summer winter bread table chair window mother father sister brother "
    "river happy yellow green orange purple lemon butter cheese animal rabbit horse tiger monkey music piano guitar letter "
    "paper pencil number seven eight three twelve morning evening night monday sunday story castle island mountain planet star "
    "light cloud storm candle basket bottle kitchen market doctor teacher farmer baker sugar honey potato tomato carrot banana "
    "cherry button ribbon mirror clock train boat ship bridge forest ocean dragon wizard queen king prince little pretty"
).split()
HOWTO = {
    "make tea": "Boil some water. Put a tea bag into a cup and pour the hot water over it. Wait three minutes and take the bag out. Add milk or sugar if you like.",
    "make coffee": "Put ground coffee into a filter and set it on a cup. Pour hot water over it slowly. Wait until it has run through. Add milk or sugar if you like.",
    "boil an egg": "Fill a pot with water and bring it to the boil. Put the egg in carefully. Wait six minutes for a soft egg or ten for a hard one. Then cool it in cold water.",
    "plant a seed": "Fill a pot with soil and make a small hole with your finger. Put the seed in and cover it. Give it some water every day and put it in the light.",
    "brush my teeth": "Put a little toothpaste on your brush. Brush all your teeth gently for two minutes. Then rinse your mouth with water.",
    "wash my hands": "Wet your hands and take some soap. Rub them together for twenty seconds. Rinse them with water and dry them with a towel.",
    "make a sandwich": "Take two slices of bread and spread butter on them. Put cheese or ham and some salad on one slice. Lay the other slice on top.",
    "make a paper boat": "Take a sheet of paper and fold it in half. Fold the corners down to the middle. Fold up the edges and pull the paper open. Now it can swim.",
    "bake a cake": "Mix flour, sugar, eggs, butter and milk in a bowl. Pour it into a tin and bake it in a hot oven for forty minutes. Let it cool before you eat it.",
    "cook rice": "Put one cup of rice and two cups of water into a pot. Add a little salt and bring it to the boil. Cook it on low heat for fifteen minutes.",
    "cook pasta": "Boil a large pot of water with some salt. Put the pasta in and cook it for about ten minutes. Pour off the water and add a sauce.",
    "make a snowman": "Roll three balls of snow, a big one, a middle one and a small one. Set them on top of each other. Use a carrot for the nose and stones for the eyes.",
    "fall asleep": "Go to bed at the same time every day. Make the room dark and quiet. Put the telephone away, breathe slowly and think of something nice.",
    "make friends": "Smile and say hello. Ask people what they like and listen to them. Be kind and honest, and share what you have.",
    "learn to swim": "Start in shallow water with somebody who can swim. First learn to float and to breathe out in the water. Then practise a little every week.",
    "ride a bicycle": "Sit on the saddle and hold the handlebars. Push off with one foot and begin to pedal. Look ahead, not down, and practise where there are no cars.",
    "make lemonade": "Press the juice out of two lemons. Add cold water and some sugar and stir well. Put in some ice, and it is ready.",
    "make pancakes": "Mix flour, milk and eggs. Heat some butter in a pan and pour in a little of the mix. Turn the pancake when it is golden and bake the other side.",
    "wrap a present": "Lay the present on a sheet of paper. Fold the paper around it and fix it with tape. Fold the ends in and tie a ribbon around it.",
    "clean my room": "First pick up everything from the floor. Put your books and clothes where they belong. Then wipe the dust off and sweep the floor.",
    "take care of a dog": "Give the dog food and fresh water every day. Take it for walks, play with it and brush it. Take it to the vet when it is sick.",
    "water a plant": "Feel the soil with your finger. If it is dry, pour some water on it slowly. Do not give too much.",
    "tie my shoes": "Cross the two laces and pull one under the other. Make a loop with one lace. Wrap the other lace around it, push it through and pull tight.",
    "write a letter": "Write the date and say hello to the person. Tell them your news and ask how they are. Sign your name at the end and put the letter in an envelope.",
    "get rid of hiccups": "Hold your breath for ten seconds. Or drink a glass of water in small sips. Then the hiccups often stop.",
}
