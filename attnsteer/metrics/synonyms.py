"""Words for COCO's 80 categories: the project's own table, and reading of tables in the format of CHAIR's authors.

A table has a line for each category; its first entry is the category's name. Scores depend on the table, so it is
named in every result, with a digest of its content, and results with different tables do not compare.
"""

from __future__ import annotations

from collections.abc import Iterable

OWN = """
person, man, woman, boy, girl, child, kid, baby, toddler, infant, adult, people, human, lady, gentleman, guy, male
person, female, teenager, pedestrian, passenger, rider, driver, player, skier, snowboarder, skateboarder, skater, surfer
person, cyclist, bicyclist, biker, motorcyclist, swimmer, pitcher, catcher, umpire, referee, athlete, worker, farmer
person, chef, waiter, waitress, policeman, policewoman, officer, soldier, fireman, firefighter, doctor, nurse, teacher
person, student, tourist, traveler, shopper, customer, vendor, bride, groom, mother, father, mom, dad, parent, daughter
person, son, brother, sister, wife, husband, grandmother, grandfather, cowboy, businessman, spectator, hiker, friend
bicycle, bike, tricycle
car, automobile, sedan, suv, van, minivan, jeep, taxi, cab, taxicab, limousine, limo, hatchback, convertible
motorcycle, motorbike, motor cycle, motor bike, moped, scooter, vespa
airplane, plane, aeroplane, air plane, aircraft, jet, jetliner, airliner, biplane, seaplane
bus, minibus, trolleybus
train, locomotive, tram, streetcar
truck, pickup, lorry, firetruck, semi, tractor trailer
boat, ship, sailboat, canoe, kayak, yacht, ferry, rowboat, motorboat, speedboat, gondola, raft, dinghy, barge
traffic light, traffic signal, stop light, stoplight, street light, streetlight
fire hydrant, hydrant
stop sign
parking meter
bench, pew
bird, duck, goose, gull, seagull, pigeon, parrot, owl, swan, eagle, hawk, crow, sparrow, ostrich, penguin, flamingo
bird, peacock, chick, hen, rooster, heron, pelican, parakeet, dove
cat, kitten, kitty, tabby
dog, puppy, pup, poodle, terrier, bulldog, retriever, labrador, dachshund, corgi, pug, chihuahua, beagle, hound
horse, pony, foal, colt, stallion, mare
sheep, lamb, ram, ewe
cow, cattle, calf, bull, ox, oxen, heifer
elephant
bear, panda
zebra
giraffe
backpack, rucksack, knapsack
umbrella, parasol
handbag, purse, pocketbook, tote
tie, necktie, bow tie, bowtie
suitcase, suit case, luggage, briefcase
frisbee
skis, ski
snowboard
sports ball, ball
kite
baseball bat
baseball glove, mitt
skateboard, longboard
surfboard, paddleboard, bodyboard
tennis racket, tennis racquet, racket, racquet
bottle
wine glass, wineglass, goblet
cup, mug, teacup
fork
knife, pocketknife, steak knife
spoon, teaspoon
bowl
banana, plantain
apple
sandwich, hamburger, burger, cheeseburger, panini
orange, clementine, tangerine
broccoli
carrot
hot dog, hotdog, frankfurter
pizza
donut, doughnut, bagel
cake, cupcake, cheesecake, birthday cake
chair, armchair, stool, seat, recliner
couch, sofa, loveseat, settee, futon
potted plant, houseplant, house plant, bonsai
bed, bunk, crib
dining table, table, desk
toilet, urinal, commode
tv, television, monitor
laptop, notebook computer, laptop computer, macbook
mouse
remote, controller
keyboard
cell phone, cellphone, mobile phone, smartphone, phone, telephone, iphone
microwave
oven, stove, stovetop
toaster
sink, washbasin
refrigerator, fridge, freezer
book, paperback, textbook
clock
vase, urn
scissors, scissor
teddy bear, teddy
hair drier, hair dryer, hairdryer, blow dryer
toothbrush
"""
"""The project's own table. A category may take several lines."""


def parse(lines: Iterable[str]) -> dict[str, str]:
    """``{entry: category}`` from lines such as ``car, automobile, van``, the category first.

    The rule of the published scripts: a line is stripped and split at ", " (a comma and one space), entries are not
    stripped again, and later lines win. An entry that keeps a space at its front is therefore never found, there and
    here.
    """
    found: dict[str, str] = {}
    for line in lines:
        entries = line.strip().split(", ")
        found |= {entry: entries[0] for entry in entries if entry}
    return found
