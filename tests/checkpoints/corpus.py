"""The text that every tiny vocabulary is trained on and that the sample inputs quote."""

CORPUS = """
The quick brown fox jumps over the lazy dog near the old river bank.
Pipelines read a job from the queue, run the model and write the result to the object store.
Yes. No. A. B. C. D. E. F. Yes, the refund is requested. No, the order is fine.
Yes Yes Yes No No No A B C D E F G H I J
I was charged twice for my order and I want a refund today, please.
The delivery was fast, the packaging was great and the support team answered in minutes.
This is the worst product that I have ever bought; it broke after two days.
Angela Merkel met Emmanuel Macron in Paris on Tuesday to discuss the European budget.
Ada Lovelace wrote the first program for the analytical engine of Charles Babbage in London.
What is the invoice number? The invoice number is us-001 and the total amount is 154.06 dollars.
Who wrote the report? When was the company founded? Where is the head office located?
How many stars does the transformers repository have? Which player scored the most goals?
The patient was admitted on Monday with a mild fever and discharged on Thursday in good health.
A cat is sleeping on the red couch next to a remote control and a cup of coffee.
Two dogs run along the beach while a man rides a bicycle and a woman reads a book.
The sound of rain, a dog barking, a person speaking, music playing, an engine starting.
Distributed workers keep one model per device and collect small batches from many requests.
In the beginning there was a single server, and it was slow, and the users were not happy.
translate English to German: The house is wonderful. Das Haus ist wunderbar.
summarize: The council approved the new bridge after a long debate about cost and traffic.
Climate scientists report that the average temperature of the ocean rose again last year.
sports politics business science technology health entertainment travel food weather
The capital of France is Paris and the capital of Germany is Berlin, but not every city is a capital.
Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12 20 25 30 42 50 64 77 88 99 100 128 256 512 1024 2048.
Punctuation! Does it work? (Yes, it does.) "Quotes", semicolons; colons: dashes - and slashes / too.
Zwei Hunde laufen am Strand. El perro duerme en el sofa rojo. Le chat boit du lait.
user assistant system: describe this image in one word. photo sound example of this is a
""".strip().splitlines()

#: About 1,900 characters: longer than the context of any tiny text model.
LONG = " ".join(CORPUS[:24])

INVOICE, ORDER, REFUND, DELIVERY = CORPUS[9], CORPUS[1], CORPUS[4], CORPUS[5]
