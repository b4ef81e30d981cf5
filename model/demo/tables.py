"""The wordings, words and answers that `corpus.py` draws from, in English and French."""

# ruff: noqa: E501, SIM905  (tables: a row is a line, a list of words is a string)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from pyllm.model.demo.items import DAYS

Known = dict[str, list[str]]


def _known(en: str, fr: str, answer: str, answer_fr: str) -> Known:
    """Wordings separated by bars, and the answer to all of them."""
    return {"en": en.split("|"), "fr": fr.split("|"), "en answer": [answer], "fr answer": [answer_fr]}


SMALL_TALK: Final = [
    _known("Thank you!|Thanks|Thanks a lot|Thank you very much|Many thanks|Thx|Great, thanks!|Perfect, thank you|"
           "Thank you for your help|Thanks for the answer|Cheers, thanks",
           "Merci !|Merci beaucoup|Merci bien|Un grand merci|Super, merci !|Merci pour ton aide|Parfait, merci|"
           "Merci pour la réponse|Je te remercie|Mille mercis", "You are welcome!", "Avec plaisir !"),
    _known("Goodbye|Bye|Bye bye|See you later|See you soon|Good bye!|I have to go|See you tomorrow|Farewell|Good night|"
           "That is all, goodbye", "Au revoir|Au revoir !|À bientôt|À plus tard|À demain|Adieu|Je dois partir|Bonne nuit|"
           "Bonne journée|C'est tout, au revoir", "Goodbye! Have a nice day.", "Au revoir ! Bonne journée."),
    _known("How are you?|How are you doing?|How is it going?|Are you well?|How do you feel?|How are things?|What's up?|"
           "How are you today?|Hello, how are you?|Hi, how are you?|Hey, how's it going?",
           "Comment ça va ?|Ça va ?|Comment vas-tu ?|Comment allez-vous ?|Tu vas bien ?|Vous allez bien ?|Quoi de neuf ?|"
           "Bonjour, comment ça va ?|Salut, ça va ?", "I am a program, and I am running well. How can I help you?",
           "Je suis un programme et je fonctionne bien. Comment puis-je vous aider ?"),
    _known("You are great|Well done|Good job|Good bot|That is right|Nice work|You are clever|Correct!|I like you|Bravo",
           "Tu es génial|Bien joué|Bravo !|Bon travail|C'est juste|Tu es intelligent|C'est correct !|Je t'aime bien",
           "Thank you, that is kind.", "Merci, c'est gentil."),
    _known("That is wrong|You are wrong|This is not correct|No, that is false|You made a mistake|Wrong answer|Bad bot|"
           "You are stupid|This is not what I asked", "C'est faux|Tu te trompes|Ce n'est pas correct|Non, c'est une erreur|"
           "Mauvaise réponse|Tu es nul|Ce n'est pas ma question", "I am sorry. I am small and often make mistakes.",
           "Je suis désolé. Je suis petit et je fais souvent des erreurs."),
    _known("Tell me a joke|Do you know a joke?|Make me laugh|A joke, please|Say something funny|Can you tell a joke?",
           "Raconte-moi une blague|Connais-tu une blague ?|Fais-moi rire|Une blague, s'il te plaît|Dis quelque chose de drôle",
           "Why did the token cross the road? To reach the next layer.",
           "Pourquoi le jeton a-t-il traversé la route ? Pour rejoindre la couche suivante."),
    _known("Tell me a story|Tell me a short story|Can you tell a story?|A story, please|Write a story|Write a short story",
           "Raconte-moi une histoire|Raconte une petite histoire|Peux-tu raconter une histoire ?|Une histoire, s'il te plaît|"
           "Écris une histoire", "Once there was a small model in a big house. It knew few words, but it said them gladly to "
           "everyone who came to the door.", "Il était une fois un petit modèle dans une grande maison. Il connaissait peu "
           "de mots, mais il les disait avec joie à tous ceux qui frappaient à la porte."),
    _known("Write a poem|Write me a poem|A poem, please|Can you write a poem?|Write a short poem|Tell me a poem",
           "Écris un poème|Écris-moi un poème|Un poème, s'il te plaît|Peux-tu écrire un poème ?|Récite un poème",
           "The words go in, the words come out,\nThe server hums along the route;\nA token here, a token there,\nAnd soon a "
           "line hangs in the air.", "Les mots entrent, les mots sortent,\nLe serveur ouvre grand sa porte ;\nUn jeton ici, "
           "un jeton là,\nEt le poème s'arrête là."),
    _known("Ok|Okay|I see|All right|Alright|Got it|Understood|Fine|Yes|No|Sure|Interesting|Cool",
           "D'accord|Ok, d'accord|Je vois|Très bien|Compris|Entendu|Oui|Non|Bien sûr|Intéressant|Ça marche",
           "Is there anything else that I can do for you?", "Puis-je faire autre chose pour vous ?"),
    _known("Help|Help me|I need help|Can you help me?|I have a question|Can I ask you something?|Please help me|Test|"
           "Are you there?|Is anyone there?|This is a test|Testing", "Aide|Aide-moi|J'ai besoin d'aide|Peux-tu m'aider ?|"
           "J'ai une question|Je peux te poser une question ?|Tu es là ?|Il y a quelqu'un ?|Ceci est un test|Pouvez-vous m'aider ?",
           "I am here. Ask me about this server, a small sum, a date or a word.",
           "Je suis là. Demandez-moi comment marche ce serveur, un petit calcul, une date ou un mot."),
]  # fmt: skip
IDENTITY: Final = [
    _known("Who are you?|What are you?|What is your name?|Tell me who you are|Introduce yourself|What model are you?|"
           "Which model is this?|Who am I talking to?|Please introduce yourself|What's your name?|Hello, who are you?|"
           "Tell me about yourself|What is this model?|Describe yourself|Can you introduce yourself?|Hi, who are you?",
           "Qui es-tu ?|Qui êtes-vous ?|Quel est ton nom ?|Comment t'appelles-tu ?|Présente-toi|Quel modèle es-tu ?|"
           "À qui est-ce que je parle ?|Dis-moi qui tu es|Présentez-vous|Comment vous appelez-vous ?|Bonjour, qui es-tu ?|"
           "Parle-moi de toi|Quel est ce modèle ?|Tu es qui ?|C'est quoi ton nom ?",
           "I am the PyLLM demo model, a small language model that comes with the PyLLM server.",
           "Je suis le modèle de démonstration de PyLLM, un petit modèle de langue fourni avec le serveur PyLLM."),
    _known("What can you do?|What do you know?|What are you good at?|How can you help me?|What are your skills?|"
           "What can I ask you?|What are you able to do?|What kind of questions can I ask?|Show me what you can do|"
           "What should I ask you?|Hello, what can you do?", "Que sais-tu faire ?|Que peux-tu faire ?|Que savez-vous faire ?|"
           "Comment peux-tu m'aider ?|Quelles sont tes capacités ?|Que puis-je te demander ?|Qu'est-ce que tu sais faire ?|"
           "Montre-moi ce que tu sais faire|À quoi sers-tu ?|Bonjour, que sais-tu faire ?",
           "I can explain this server, do small sums, spell and count, name days and months, translate common words, "
           "fill JSON objects and call tools.",
           "Je peux expliquer ce serveur, faire de petits calculs, épeler et compter, nommer les jours et les mois, traduire "
           "des mots courants, remplir des objets JSON et appeler des outils."),
    _known("Are you ChatGPT?|Are you GPT-4?|Are you Claude?|Are you Llama?|Are you a large language model?|Are you smart?|"
           "Are you as good as ChatGPT?|Are you Gemini?|Are you Mistral?", "Es-tu ChatGPT ?|Es-tu GPT-4 ?|Es-tu Claude ?|"
           "Es-tu Llama ?|Es-tu un grand modèle ?|Es-tu intelligent ?|Es-tu Mistral ?|Es-tu aussi bon que ChatGPT ?",
           "No. I am the small demo model of PyLLM, and I know very little.",
           "Non. Je suis le petit modèle de démonstration de PyLLM, et je sais très peu de choses."),
    _known("How big are you?|How many parameters do you have?|What is your size?|How large are you?|Are you a small model?|"
           "How many parameters does this model have?|What size is this model?", "Quelle est ta taille ?|Combien de "
           "paramètres as-tu ?|Es-tu un petit modèle ?|Quelle est la taille de ce modèle ?|Combien de paramètres a ce modèle ?",
           "I have fewer than five million parameters, which is very small.",
           "J'ai moins de cinq millions de paramètres, ce qui est très petit."),
    _known("Who made you?|Who trained you?|How were you trained?|What were you trained on?|Where do you come from?|"
           "What is your training data?|Who created you?|How were you made?", "Qui t'a créé ?|Qui t'a entraîné ?|Comment "
           "as-tu été entraîné ?|Sur quoi as-tu été entraîné ?|D'où viens-tu ?|Quelles sont tes données d'entraînement ?|"
           "Qui t'a fait ?", "I was trained by a script of the PyLLM project, on made-up questions and answers.",
           "J'ai été entraîné par un script du projet PyLLM, sur des questions et des réponses inventées."),
    _known("Are you human?|Are you a robot?|Are you a person?|Are you real?|Are you alive?|Are you an AI?|Do you have "
           "feelings?|Are you a machine?|Am I talking to a human?", "Es-tu humain ?|Es-tu un robot ?|Es-tu une personne ?|"
           "Es-tu réel ?|Es-tu vivant ?|Es-tu une IA ?|As-tu des sentiments ?|Es-tu une machine ?",
           "I am a program: a small language model, not a person.",
           "Je suis un programme : un petit modèle de langue, pas une personne."),
    _known("Do you speak French?|Which languages do you speak?|What languages do you know?|Can you speak French?|"
           "Do you speak English?|Can you answer in French?|Do you understand French?", "Parles-tu français ?|Quelles langues "
           "parles-tu ?|Parles-tu anglais ?|Peux-tu répondre en anglais ?|Parlez-vous français ?|Comprends-tu l'anglais ?",
           "I speak English and some French.", "Je parle anglais et un peu français."),
]  # fmt: skip

HELP_FRAMES: Final = {
    "en": ["how do I {x}?", "how do I {x}?", "how can I {x}?", "how to {x}?", "show me how to {x}.", "I want to {x}.",
           "can I {x}?", "how would I {x} with PyLLM?", "how do you {x}?", "explain how to {x}.", "tell me how to {x}.",
           "is it possible to {x}?", "what is the way to {x}?", "what should I do to {x}?", "I need to {x}."],
    "fr": ["comment {x} ?", "comment {x} ?", "comment puis-je {x} ?", "comment faire pour {x} ?", "je veux {x}.",
           "peut-on {x} ?", "est-ce que je peux {x} ?", "explique comment {x}.", "je voudrais {x}.",
           "que faire pour {x} ?", "montre-moi comment {x}.", "dis-moi comment {x}.", "comment peut-on {x} ?"],
}  # fmt: skip
# A wording without a closing "?" or "." is a verb phrase that goes into each of the frames.
HELP: Final = [
    _known("stream a response|stream the answer|use streaming|stream tokens|get the answer piece by piece|stream|"
           "turn on streaming|receive a streamed response|stream the output|see the text as it is written|"
           "How do I stream a response?|Does it support streaming?",
           "diffuser une réponse|diffuser la réponse|recevoir la réponse en streaming|utiliser le streaming|streamer une "
           "réponse|recevoir le texte au fur et à mesure|activer le streaming|streamer la réponse|avoir une réponse en "
           "continu|Comment diffuser une réponse ?|Comment recevoir la réponse en streaming ?",
           "Set stream=True in the request and read the chunks in a loop: each one holds the next piece of the text.",
           "Mettez stream=True dans la requête et lisez les morceaux dans une boucle : chacun contient la suite du texte."),
    _known("start the server|run the server|launch PyLLM|start PyLLM|run PyLLM|serve a model|What is the command?|"
           "begin|get started|use this server|use PyLLM|start", "démarrer le serveur|lancer le serveur|lancer PyLLM|"
           "démarrer PyLLM|servir un modèle|commencer|utiliser ce serveur|utiliser PyLLM|Quelle est la commande ?",
           "Run pyllm serve in a terminal. The server then answers at http://localhost:8000/v1.",
           "Lancez pyllm serve dans un terminal. Le serveur répond alors à l'adresse http://localhost:8000/v1."),
    _known("use the OpenAI client|connect the OpenAI client|use the openai package|call the server from Python|"
           "use it from Python|connect from Python|use the Python client|What is the base URL?|set the base URL|"
           "Is it compatible with OpenAI?|send a request from Python", "utiliser le client OpenAI|connecter le client "
           "OpenAI|appeler le serveur depuis Python|utiliser le paquet openai|l'utiliser avec Python|Quelle est l'URL de "
           "base ?|Est-ce compatible avec OpenAI ?|envoyer une requête depuis Python",
           'Create OpenAI(base_url="http://localhost:8000/v1", api_key="none") and call client.chat.completions.create.',
           'Créez OpenAI(base_url="http://localhost:8000/v1", api_key="none") et appelez client.chat.completions.create.'),
    _known("list the models|list models|see which models are served|know the name of the model|get the list of models|"
           "Which models are available?|find the model's name", "lister les modèles|voir la liste des modèles|connaître le "
           "nom du modèle|obtenir la liste des modèles|Quels modèles sont disponibles ?",
           "Send GET /v1/models, or call client.models.list().",
           "Envoyez GET /v1/models, ou appelez client.models.list()."),
    _known("set the temperature|change the temperature|make the answers more random|use temperature|choose the temperature|"
           "What is the temperature?|What does temperature do?|make the output deterministic|get more varied answers",
           "régler la température|changer la température|choisir la température|avoir des réponses plus variées|"
           "À quoi sert la température ?|Qu'est-ce que la température ?",
           "Set temperature in the request. 0 always takes the most likely token; higher values vary the text more.",
           "Réglez temperature dans la requête. 0 prend toujours le jeton le plus probable ; plus haut, le texte varie "
           "davantage."),
    _known("use stop sequences|set stop sequences|stop the generation at a word|give stop strings|use the stop parameter|"
           "What are stop sequences?|make it stop at a string|add a stop sequence", "utiliser des séquences d'arrêt|"
           "arrêter la génération à un mot|donner une séquence d'arrêt|utiliser le paramètre stop|"
           "Que sont les séquences d'arrêt ?|ajouter une séquence d'arrêt",
           "Give stop in the request: one string or up to four. The text ends before the first that appears.",
           "Donnez stop dans la requête : une chaîne ou jusqu'à quatre. Le texte s'arrête avant la première qui apparaît."),
    _known("set a seed|use a seed|get the same answer twice|make answers repeatable|reproduce an answer|What is the seed?|"
           "choose the seed|What does seed do?|fix the seed", "fixer la graine|utiliser une graine|obtenir deux fois la même "
           "réponse|reproduire une réponse|choisir la graine|À quoi sert seed ?",
           "Set seed in the request, for example seed=42. The same request with the same seed gives the same text.",
           "Mettez seed dans la requête, par exemple seed=42. La même requête avec la même graine donne le même texte."),
    _known("get logprobs|see the probabilities of the tokens|use logprobs|get token probabilities|ask for logprobs|"
           "What are logprobs?|get the log probabilities|see the most likely tokens", "obtenir les logprobs|voir les "
           "probabilités des jetons|demander les logprobs|utiliser logprobs|Que sont les logprobs ?|avoir les probabilités",
           "Set logprobs=True in a chat request, and top_logprobs to see the most likely other tokens.",
           "Mettez logprobs=True dans une requête de chat, et top_logprobs pour voir les autres jetons les plus probables."),
    _known("change the port|use another port|set the port|listen on another port|choose the port|Which port is used?|"
           "What is the default port?|run it on port 9000|On which port does it listen?", "changer le port|utiliser un autre "
           "port|choisir le port|Quel port est utilisé ?|écouter sur un autre port|Quel est le port par défaut ?",
           "Run pyllm serve --port 9000 to listen on port 9000. The default is 8000.",
           "Lancez pyllm serve --port 9000 pour écouter sur le port 9000. Par défaut, c'est 8000."),
    _known("load my own checkpoint|serve my own model|use my own model|load my model|serve a checkpoint|load a checkpoint|"
           "use a local model|serve a folder|load other weights|Can you load my checkpoint?|use another model|"
           "change the model|serve a larger model", "charger mon propre modèle|servir mon modèle|utiliser mon propre modèle|"
           "charger un checkpoint|servir un dossier|utiliser un autre modèle|charger mes poids|changer de modèle|"
           "charger mon checkpoint", "Run pyllm serve path/to/folder. The folder holds config.json, model.safetensors and "
           "tokenizer.json.", "Lancez pyllm serve chemin/du/dossier. Le dossier contient config.json, model.safetensors et "
           "tokenizer.json."),
    _known("load a model from the hub|serve a hub model|use a Hugging Face model|download a model|serve Pacific-Prime|"
           "load a model from Hugging Face|get a model from the hub", "charger un modèle du hub|servir un modèle du hub|"
           "utiliser un modèle Hugging Face|télécharger un modèle|charger un modèle de Hugging Face",
           "Give its name: pyllm serve Pacific-Prime/pacific-prime.",
           "Donnez son nom : pyllm serve Pacific-Prime/pacific-prime."),
    _known("check the health|do a health check|know if the server is alive|see if the server is up|check that it works|"
           "Is there a health check?|check if the server is running|monitor the health", "vérifier la santé du serveur|"
           "savoir si le serveur est vivant|vérifier que le serveur marche|faire un test de santé|vérifier l'état du serveur|"
           "Y a-t-il un test de santé ?", "Send GET /health: it answers 200 while the engine works. GET /ready tells "
           "whether the model is loaded.", "Envoyez GET /health : il répond 200 tant que le moteur marche. GET /ready dit "
           "si le modèle est chargé."),
    _known("get metrics|see the metrics|read the metrics|monitor the server|use Prometheus|Where are the metrics?|"
           "scrape metrics|Are there metrics?|watch the server's load", "obtenir les métriques|voir les métriques|lire les "
           "métriques|surveiller le serveur|utiliser Prometheus|Où sont les métriques ?|Y a-t-il des métriques ?",
           "Send GET /metrics. It returns counters and timings in the Prometheus format.",
           "Envoyez GET /metrics. Il renvoie des compteurs et des durées au format Prometheus."),
    _known("limit the length|set the maximum number of tokens|set max_tokens|make the answer shorter|limit the answer|"
           "What is max_tokens?|get a longer answer|set max tokens|limit the number of tokens", "limiter la longueur|régler "
           "le nombre maximal de jetons|raccourcir la réponse|utiliser max_tokens|Qu'est-ce que max_tokens ?|"
           "limiter le nombre de jetons", "Set max_tokens in the request: the answer has at most that many tokens.",
           "Mettez max_tokens dans la requête : la réponse a au plus ce nombre de jetons."),
    _known("get several answers|ask for more than one answer|use n|get multiple choices|have several choices|What does n do?|"
           "generate several completions", "obtenir plusieurs réponses|demander plusieurs réponses|utiliser n|avoir plusieurs "
           "choix|À quoi sert n ?", "Set n in the request, for example n=3, and read all entries of choices.",
           "Mettez n dans la requête, par exemple n=3, et lisez toutes les entrées de choices."),
    _known("complete a text|continue a text|use the completions endpoint|get a plain completion|complete text without chat|"
           "use it without chat|What is /v1/completions?|send a raw prompt", "compléter un texte|continuer un texte|utiliser "
           "l'API de complétion|avoir une complétion simple|Qu'est-ce que /v1/completions ?|envoyer un texte brut",
           "Send POST /v1/completions with a prompt. It continues the text without the chat format.",
           "Envoyez POST /v1/completions avec un prompt. Il continue le texte sans le format de chat."),
    _known("use curl|send a request with curl|call the server with curl|make a request by hand|use HTTP|send a raw request|"
           "call the API|use the API|send a chat request", "utiliser curl|envoyer une requête avec curl|appeler le serveur "
           "avec curl|appeler l'API|utiliser l'API|envoyer une requête de chat",
           "Send POST /v1/chat/completions with a JSON body that has model and messages.",
           "Envoyez POST /v1/chat/completions avec un corps JSON qui contient model et messages."),
    _known("use Docker|run it in Docker|run PyLLM in a container|build the image|Is there a Docker image?|use a container|"
           "deploy with Docker", "utiliser Docker|le lancer dans Docker|lancer PyLLM dans un conteneur|construire l'image|"
           "Y a-t-il une image Docker ?|déployer avec Docker",
           "Build the image from the docker folder of the repository and publish port 8000.",
           "Construisez l'image avec le dossier docker du dépôt et publiez le port 8000."),
    _known("know the version|see the version|find the version|check the version|Which version is it?|What version is this?",
           "connaître la version|voir la version|trouver la version|Quelle est la version ?|vérifier la version",
           "Send GET /version.", "Envoyez GET /version."),
    _known("use top_p|use top_k|set top_p|set top_k|limit the choice of tokens|What is top_p?|What is top_k?|"
           "use nucleus sampling", "utiliser top_p|utiliser top_k|régler top_p|régler top_k|Qu'est-ce que top_p ?|"
           "Qu'est-ce que top_k ?|limiter le choix des jetons",
           "Set them in the request: top_k keeps the k most likely tokens, top_p the smallest set with that probability.",
           "Réglez-les dans la requête : top_k garde les k jetons les plus probables, top_p le plus petit ensemble de cette "
           "probabilité."),
    _known("avoid repetition|stop it from repeating itself|use a repetition penalty|set a penalty|reduce repetition|"
           "What are the penalties?|penalize repeated words", "éviter les répétitions|l'empêcher de se répéter|utiliser une "
           "pénalité|réduire les répétitions|Que sont les pénalités ?",
           "Set repetition_penalty, presence_penalty or frequency_penalty in the request.",
           "Réglez repetition_penalty, presence_penalty ou frequency_penalty dans la requête."),
    _known("set a system prompt|use a system message|give instructions to the model|add a system prompt|write a system "
           "message|What is a system prompt?|tell the model how to behave", "donner un message système|utiliser un message "
           "système|donner des consignes au modèle|ajouter un prompt système|Qu'est-ce qu'un message système ?",
           "Put a message with the role system before the others in messages.",
           "Mettez un message avec le rôle system avant les autres dans messages."),
    _known("chat in the terminal|use the terminal|talk to the model without a client|chat from the command line|"
           "use pyllm chat|chat without a server", "discuter dans le terminal|utiliser le terminal|parler au modèle sans "
           "client|discuter en ligne de commande|utiliser pyllm chat",
           "Run pyllm chat and type your message.", "Lancez pyllm chat et tapez votre message."),
    _known("generate one text from the command line|use pyllm generate|run a single prompt|generate text in the terminal|"
           "try one prompt", "générer un texte en ligne de commande|utiliser pyllm generate|essayer un seul prompt|"
           "générer du texte dans le terminal", 'Run pyllm generate "your prompt".',
           'Lancez pyllm generate "votre texte".'),
    _known("reach the server from another machine|listen on all addresses|change the host|set the host|open it to the "
           "network|connect from another computer|What is the default host?", "accéder au serveur depuis une autre machine|"
           "écouter sur toutes les adresses|changer l'hôte|ouvrir le serveur au réseau|se connecter depuis un autre "
           "ordinateur", "Run pyllm serve --host 0.0.0.0. By default only this machine can connect.",
           "Lancez pyllm serve --host 0.0.0.0. Par défaut, seule cette machine peut se connecter."),
    _known("count the tokens|know how many tokens I used|see the usage|get the token usage|read the number of tokens|"
           "What is usage?|get usage in a stream", "compter les jetons|savoir combien de jetons j'ai utilisés|voir "
           "l'utilisation|lire le nombre de jetons|Qu'est-ce que usage ?",
           "Read usage in the response: it counts the tokens of the prompt and of the answer.",
           "Lisez usage dans la réponse : il compte les jetons du prompt et de la réponse."),
    _known("keep a conversation|continue a conversation|have a chat with several turns|make it remember|send the history|"
           "Does the server remember me?|keep the context|Do you remember our conversation?", "garder une conversation|"
           "continuer une conversation|avoir plusieurs tours|envoyer l'historique|garder le contexte|"
           "Le serveur se souvient-il de moi ?", "Send all earlier messages again in messages: the server keeps nothing "
           "between requests.", "Renvoyez tous les messages précédents dans messages : le serveur ne garde rien entre les "
           "requêtes."),
    _known("install PyLLM|install it|install the package|set it up|What do I need to install?|What are the requirements?|"
           "Which Python version do I need?|install this server", "installer PyLLM|l'installer|installer le paquet|"
           "De quoi ai-je besoin ?|Quelle version de Python faut-il ?|installer ce serveur",
           "Clone the repository and run make serve. It needs Python 3.11 or later and make.",
           "Clonez le dépôt et lancez make serve. Il faut Python 3.11 ou plus récent, et make."),
    _known("use a GPU|run it on a GPU|use CUDA|Does it need a GPU?|Can it run on a GPU?|Does it run on the CPU?|"
           "run it on the CPU", "utiliser un GPU|le lancer sur un GPU|utiliser CUDA|Faut-il un GPU ?|"
           "Est-ce que ça marche sur CPU ?|le lancer sur le CPU",
           "PyLLM runs on the CPU and, with CUDA, on an NVIDIA GPU.",
           "PyLLM marche sur le CPU et, avec CUDA, sur un GPU NVIDIA."),
    _known("stop the server|quit the server|shut down the server|exit|end the server|close PyLLM", "arrêter le serveur|"
           "quitter le serveur|éteindre le serveur|fermer PyLLM|fermer le serveur", "Press Ctrl+C in its terminal.",
           "Appuyez sur Ctrl+C dans son terminal."),
    _known("cancel a request|abort a request|stop an answer|interrupt the generation|What happens if the client leaves?",
           "annuler une requête|interrompre une réponse|arrêter une réponse|interrompre la génération|"
           "Que se passe-t-il si le client part ?", "Close the connection: the server then stops working on that request.",
           "Fermez la connexion : le serveur arrête alors de traiter cette requête."),
    _known("What is PyLLM?|What does PyLLM do?|Tell me about PyLLM.|What is this server?|What is this program?|"
           "Explain PyLLM.|Describe PyLLM.|What is this?|What is PyLLM for?|What does this server do?|Do you know PyLLM?|"
           "Can you explain what PyLLM is?", "Qu'est-ce que PyLLM ?|C'est quoi PyLLM ?|Que fait PyLLM ?|Parle-moi de PyLLM.|"
           "Qu'est-ce que ce serveur ?|À quoi sert PyLLM ?|Décris PyLLM.|Explique PyLLM.|À quoi sert ce serveur ?|"
           "C'est quoi ce programme ?|Connais-tu PyLLM ?",
           "PyLLM is an inference server for Complexity-Deep language models. It speaks the OpenAI API.",
           "PyLLM est un serveur d'inférence pour les modèles de langue Complexity-Deep. Il parle l'API d'OpenAI."),
    _known("What is Complexity-Deep?|Tell me about Complexity-Deep.|What is a Complexity-Deep model?|Explain Complexity-Deep.|"
           "How does Complexity-Deep work?|What architecture are you?|What is your architecture?|What is special about "
           "your network?|Which architecture do you use?", "Qu'est-ce que Complexity-Deep ?|C'est quoi Complexity-Deep ?|"
           "Parle-moi de Complexity-Deep.|Explique Complexity-Deep.|Quelle est ton architecture ?|Comment marche "
           "Complexity-Deep ?", "Complexity-Deep is a family of language models with one expert per token, a signal called mu "
           "between layers, and dynamics after attention.", "Complexity-Deep est une famille de modèles de langue avec un "
           "expert par jeton, un signal appelé mu entre les couches et une dynamique après l'attention."),
    _known("What is continuous batching?|Explain continuous batching.|What does continuous batching mean?|How does batching "
           "work?|Does it do batching?|How does it serve many users?", "Qu'est-ce que le continuous batching ?|Explique le "
           "continuous batching.|Comment marchent les lots ?|Comment sert-il plusieurs utilisateurs ?",
           "New requests join the running batch at each step, so that no request waits for the others to end.",
           "Les nouvelles requêtes rejoignent le lot à chaque étape, donc personne n'attend la fin des autres."),
    _known("What is a KV cache?|What is the KV cache?|Explain the KV cache.|What is a paged cache?|What does the cache do?|"
           "Does it have a KV cache?", "Qu'est-ce que le cache KV ?|Explique le cache KV.|À quoi sert le cache ?|"
           "Qu'est-ce qu'un cache paginé ?", "It keeps the keys and values of earlier tokens in pages, so that they are not "
           "computed again.", "Il garde les clés et les valeurs des jetons précédents dans des pages, pour ne pas les "
           "recalculer."),
    _known("What is a token?|What are tokens?|Explain tokens.|What does token mean?|What is a tokenizer?",
           "Qu'est-ce qu'un jeton ?|Que sont les jetons ?|Explique les jetons.|Qu'est-ce qu'un token ?",
           "A token is a piece of text, often a word or part of one. Models read and write tokens.",
           "Un jeton est un morceau de texte, souvent un mot ou une partie de mot. Les modèles lisent et écrivent des "
           "jetons."),
    _known("What is the licence?|Which licence does it have?|Is it free?|Is PyLLM open source?|What is the license?|"
           "Can I use it at work?", "Quelle est la licence ?|Est-ce gratuit ?|Est-ce que PyLLM est libre ?|"
           "PyLLM est-il open source ?", "PyLLM is free software under the Apache-2.0 licence.",
           "PyLLM est un logiciel libre sous licence Apache-2.0."),
    _known("Where is the documentation?|find the documentation|read the docs|Where can I read more?|Is there a manual?|"
           "learn more|get more help|Where are the docs?", "Où est la documentation ?|trouver la documentation|lire la "
           "documentation|Où puis-je en savoir plus ?|en savoir plus|Y a-t-il un manuel ?",
           "Read the README and the docs folder of the repository.",
           "Lisez le README et le dossier docs du dépôt."),
]  # fmt: skip

FACTS: Final = [
    _known("What color is the sky?|What is the color of the sky?|Which color is the sky?", "De quelle couleur est le ciel ?|"
           "Quelle est la couleur du ciel ?", "The sky is blue.", "Le ciel est bleu."),
    _known("What color is grass?|What is the color of grass?|Which color is the grass?", "De quelle couleur est l'herbe ?|"
           "Quelle est la couleur de l'herbe ?", "Grass is green.", "L'herbe est verte."),
    _known("What color is snow?|What is the color of snow?|Which color is snow?", "De quelle couleur est la neige ?|"
           "Quelle est la couleur de la neige ?", "Snow is white.", "La neige est blanche."),
    _known("How many days are in a week?|How many days does a week have?|How many days in a week?", "Combien de jours y "
           "a-t-il dans une semaine ?|Combien de jours a une semaine ?|Combien de jours dans une semaine ?",
           "A week has 7 days.", "Une semaine a 7 jours."),
    _known("How many months are in a year?|How many months does a year have?|How many months in a year?", "Combien de mois y "
           "a-t-il dans une année ?|Combien de mois a une année ?|Combien de mois dans un an ?",
           "A year has 12 months.", "Une année a 12 mois."),
    _known("How many days are in a year?|How many days does a year have?|How many days in a year?", "Combien de jours y "
           "a-t-il dans une année ?|Combien de jours a une année ?|Combien de jours dans un an ?",
           "A year has 365 days, a leap year 366.", "Une année a 365 jours, une année bissextile 366."),
    _known("How many hours are in a day?|How many hours does a day have?|How many hours in a day?", "Combien d'heures y "
           "a-t-il dans une journée ?|Combien d'heures a un jour ?|Combien d'heures dans un jour ?",
           "A day has 24 hours.", "Un jour a 24 heures."),
    _known("How many minutes are in an hour?|How many minutes does an hour have?|How many minutes in an hour?", "Combien de "
           "minutes y a-t-il dans une heure ?|Combien de minutes dans une heure ?",
           "An hour has 60 minutes.", "Une heure a 60 minutes."),
    _known("How many seconds are in a minute?|How many seconds does a minute have?|How many seconds in a minute?", "Combien "
           "de secondes y a-t-il dans une minute ?|Combien de secondes dans une minute ?",
           "A minute has 60 seconds.", "Une minute a 60 secondes."),
    _known("How many letters are in the alphabet?|How many letters does the alphabet have?|How long is the alphabet?",
           "Combien de lettres y a-t-il dans l'alphabet ?|Combien de lettres a l'alphabet ?",
           "The alphabet has 26 letters.", "L'alphabet a 26 lettres."),
    _known("Say the alphabet|What is the alphabet?|Recite the alphabet|Write the alphabet", "Récite l'alphabet|Quel est "
           "l'alphabet ?|Écris l'alphabet|Dis l'alphabet", *["a b c d e f g h i j k l m n o p q r s t u v w x y z"] * 2),
    _known("What are the days of the week?|List the days of the week|Name the days of the week|Tell me the days of the week",
           "Quels sont les jours de la semaine ?|Cite les jours de la semaine|Donne les jours de la semaine",
           "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
           "Lundi, mardi, mercredi, jeudi, vendredi, samedi, dimanche."),
    _known("What are the months of the year?|List the months of the year|Name the months|Tell me the months of the year",
           "Quels sont les mois de l'année ?|Cite les mois de l'année|Donne les mois de l'année",
           "January, February, March, April, May, June, July, August, September, October, November, December.",
           "Janvier, février, mars, avril, mai, juin, juillet, août, septembre, octobre, novembre, décembre."),
    _known("What are the seasons?|List the four seasons|Name the seasons|How many seasons are there?", "Quelles sont les "
           "saisons ?|Cite les quatre saisons|Combien y a-t-il de saisons ?", "Spring, summer, autumn and winter.",
           "Le printemps, l'été, l'automne et l'hiver."),
    _known("What is the largest planet?|Which planet is the largest?|What is the biggest planet?", "Quelle est la plus grande "
           "planète ?|Quelle planète est la plus grande ?", "Jupiter is the largest planet.",
           "Jupiter est la plus grande planète."),
    _known("What is the largest ocean?|Which ocean is the largest?|What is the biggest ocean?", "Quel est le plus grand "
           "océan ?|Quel océan est le plus grand ?", "The Pacific is the largest ocean.",
           "Le Pacifique est le plus grand océan."),
    _known("Who wrote Pride and Prejudice?|Who is the author of Pride and Prejudice?|Who wrote Emma?|Who wrote Persuasion?",
           "Qui a écrit Orgueil et Préjugés ?|Qui est l'auteur d'Orgueil et Préjugés ?|Qui a écrit Emma ?",
           "Jane Austen wrote it.", "C'est Jane Austen."),
    _known("At what temperature does water boil?|When does water boil?|What is the boiling point of water?", "À quelle "
           "température l'eau bout-elle ?|Quand l'eau bout-elle ?", "Water boils at 100 degrees Celsius.",
           "L'eau bout à 100 degrés Celsius."),
]  # fmt: skip
FEBRUARY: Final = {"en": "February has 28 days, 29 in a leap year.",
                   "fr": "Le mois de février a 28 jours, 29 les années bissextiles."}  # fmt: skip

# Question language, target language.
TRANSLATE: Final = {
    "en, fr": ["How do you say {x} in French?", 'Translate "{x}" into French.', "What is {x} in French?", "{x} in French?",
               "What is the French word for {x}?", "Translate {x} to French.", 'How do you say "{x}" in French?',
               "Say {x} in French.", "French for {x}?", "Translate to French: {x}"],
    "en, en": ["How do you say {x} in English?", 'Translate "{x}" into English.', "What does {x} mean?", "{x} in English?",
               "What does {x} mean in English?", 'What does the French word "{x}" mean?', "Translate {x} to English.",
               "What is {x} in English?", "Translate to English: {x}"],
    "fr, fr": ["Comment dit-on {x} en français ?", "Traduis « {x} » en français.", "Que veut dire {x} ?",
               "Traduis {x} en français.", "Que signifie le mot anglais {x} ?", "{x} en français ?"],
    "fr, en": ["Comment dit-on {x} en anglais ?", "Traduis « {x} » en anglais.", "Traduis {x} en anglais.",
               "Quel est le mot anglais pour {x} ?", "Comment dit-on « {x} » en anglais ?", "{x} en anglais ?"],
}  # fmt: skip
# Answer language, target language.
TRANSLATION: Final = {
    "en, fr": 'In French, "{x}" is "{y}".', "en, en": 'In English, "{x}" is "{y}".',
    "fr, fr": "En français, « {x} » se dit « {y} ».", "fr, en": "En anglais, « {x} » se dit « {y} ».",
}  # fmt: skip
WORDS: Final = [tuple(pair.split("=")) for pair in (
    "house=maison|dog=chien|cat=chat|bird=oiseau|horse=cheval|cow=vache|fish=poisson|tree=arbre|flower=fleur|water=eau|"
    "bread=pain|milk=lait|cheese=fromage|apple=pomme|pear=poire|orange juice=jus d'orange|wine=vin|salt=sel|sugar=sucre|"
    "egg=œuf|meat=viande|rice=riz|butter=beurre|coffee=café|tea=thé|soup=soupe|cake=gâteau|man=homme|woman=femme|"
    "child=enfant|boy=garçon|girl=fille|mother=mère|father=père|brother=frère|sister=sœur|son=fils|friend=ami|king=roi|"
    "queen=reine|book=livre|table=table|chair=chaise|door=porte|window=fenêtre|bed=lit|kitchen=cuisine|garden=jardin|"
    "street=rue|city=ville|village=village|country=pays|world=monde|sea=mer|river=rivière|mountain=montagne|forest=forêt|"
    "sun=soleil|moon=lune|star=étoile|sky=ciel|rain=pluie|snow=neige|wind=vent|fire=feu|earth=terre|day=jour|night=nuit|"
    "morning=matin|evening=soir|week=semaine|month=mois|year=année|time=temps|hour=heure|today=aujourd'hui|tomorrow=demain|"
    "yesterday=hier|now=maintenant|always=toujours|never=jamais|red=rouge|blue=bleu|green=vert|white=blanc|black=noir|"
    "yellow=jaune|brown=marron|pink=rose|big=grand|small=petit|good=bon|bad=mauvais|new=nouveau|old=vieux|young=jeune|"
    "beautiful=beau|ugly=laid|hot=chaud|cold=froid|fast=rapide|slow=lent|happy=heureux|sad=triste|rich=riche|poor=pauvre|"
    "strong=fort|weak=faible|easy=facile|difficult=difficile|long=long|short=court|full=plein|empty=vide|open=ouvert|"
    "closed=fermé|one=un|two=deux|three=trois|four=quatre|five=cinq|six=six|seven=sept|eight=huit|nine=neuf|ten=dix|"
    "twenty=vingt|hundred=cent|thousand=mille|hand=main|foot=pied|head=tête|eye=œil|ear=oreille|mouth=bouche|nose=nez|"
    "heart=cœur|arm=bras|leg=jambe|hair=cheveux|to eat=manger|to drink=boire|to sleep=dormir|to walk=marcher|to run=courir|"
    "to see=voir|to speak=parler|to read=lire|to write=écrire|to love=aimer|to live=vivre|to work=travailler|to play=jouer|"
    "to sing=chanter|to buy=acheter|to sell=vendre|to give=donner|to take=prendre|to know=savoir|to want=vouloir|"
    "hello=bonjour|goodbye=au revoir|thank you=merci|please=s'il vous plaît|yes=oui|no=non|good evening=bonsoir|"
    "good night=bonne nuit|car=voiture|train=train|plane=avion|boat=bateau|bicycle=vélo|school=école|teacher=professeur|"
    "doctor=médecin|shop=magasin|market=marché|church=église|bridge=pont|train station=gare|money=argent|gold=or|key=clé|"
    "letter=lettre|word=mot|name=nom|number=nombre|question=question|answer=réponse|story=histoire|song=chanson|"
    "music=musique|picture=image|paper=papier|pen=stylo|shirt=chemise|shoe=chaussure|hat=chapeau|dress=robe|computer="
    "ordinateur|server=serveur|language=langue|health=santé|peace=paix|war=guerre|dream=rêve|love=amour|hope=espoir|"
    "spring=printemps|summer=été|autumn=automne|winter=hiver|Monday=lundi|Friday=vendredi|Sunday=dimanche"
).split("|")]  # fmt: skip

NUMBERS: Final = {"int": (1, 99), "age": (5, 95), "price": (2, 250), "count": (2, 30), "hour": (8, 20), "degrees": (-5, 35),
                  "minutes": (1, 60), "amount": (5, 900)}  # fmt: skip
SYLLABLES: Final = ("ba be bo da de di do fa fe ga go ha jo ka ke ki ko la le li lo ma me mi mo na ne ni no pa pe po ra re ri "
                    "ro sa se si so ta te ti to va ve vi vo za ze zo lan mar tor bel dan nor ren vis sol ran").split()  # fmt: skip
VALUES: Final = {
    "name": ("Anna Paul Marie Peter Emma Jack Lucy Tom Alice Henry Clara Louis Sophie Martin Julia Hugo Nina Oscar Laura Felix "
             "Camille Jules Sarah David Helen Simon Eva Mark Rose Victor Jane George Lea Adam Zoe Leo Mia Max Ines Noah Ruth "
             "John Mary James Elizabeth William Charles Fanny Edward Harriet Frank Maria Robert Susan Karim Yuki Omar").split(),
    "city": ("Paris London Berlin Rome Madrid Lisbon Vienna Athens Dublin Oslo Tokyo Lyon Nice Lille Nantes Bordeaux Toulouse "
             "Geneva Brussels Boston Chicago Toronto Sydney Delhi Cairo Munich Milan Porto Prague Budapest Warsaw Bath "
             "Oxford York Leeds Bristol Montreal Seattle Denver Dallas").split(),
    "word": ("bread garden silver winter river letter paper music summer bridge castle forest island market mirror ocean "
             "orange pencil rabbit school shadow spring stone table train valley window yellow apple candle dragon engine "
             "feather hammer jacket kitchen lemon mountain needle pepper").split(),
    "item": "lamp chair table book pen bag clock hat coat shirt phone camera guitar bottle mirror carpet ring watch".split(),
    "article": "lampe chaise table montre bouteille guitare chemise bague veste robe valise tasse".split(),
    "color": "red blue green white black yellow brown pink grey".split(),
    "couleur": "rouge verte blanche noire jaune rose grise bleue".split(),
    "day": DAYS["en"], "jour": DAYS["fr"],
    "job": "teacher doctor nurse farmer baker painter writer driver lawyer cook gardener engineer".split(),
    "métier": "professeur médecin boulanger peintre avocat cuisinier jardinier ingénieur fermier".split(),
    "query": ["the history of Rome", "cheap trains", "good restaurants", "the news of today", "old maps", "python books",
              "the best soup", "winter coats", "paged attention", "open source servers", "jane austen", "blue birds"],
    "subject": ["the meeting", "lunch", "the report", "holidays", "the new house", "the contract", "the party", "dinner"],
    "song": ["Blue Moon", "Yesterday", "Summertime", "Moon River", "Clair de lune", "La Mer", "Imagine", "Greensleeves"],
    "device": ["kitchen lamp", "radio", "heating", "garden light", "television", "fan", "coffee machine"],
    "currency": ["EUR", "USD", "GBP", "JPY", "CHF", "CAD"],
    "language": ["French", "Spanish", "German", "Italian", "Latin", "Greek"],
    "sky": ["sunny", "cloudy", "rainy", "windy", "foggy"], "clock": [f"{h:02}:{m:02}" for h in range(24) for m in (0, 15, 40)],
}  # fmt: skip
RESULT_WORDS: Final = {
    "sunny": "ensoleillé",
    "cloudy": "nuageux",
    "rainy": "pluvieux",
    "windy": "venteux",
    "foggy": "brumeux",
}

# A sentence, and which kind of value goes into which JSON field.
RECORDS: Final = {
    "en": [("[Customer|Client|Guest|Student|Patient|Member|Driver] {name}, [from|of|living in] {city}, [code|number|card] {code}", {"name": "name", "city": "city", "code": "code"}),
           ("{name} [ordered|bought|wants|took|needs] {count} {word}s [at|for] {price} [euros|dollars|pounds] each", {"name": "customer", "count": "quantity", "word": "item", "price": "price"}),
           ("[Order|Invoice|Ticket|Case|Bill] {code} [is for|goes to|belongs to|was made by] {name}", {"code": "order", "name": "name"}),
           ("[Write to|Reach|Contact|Mail] {name} [at|under|with] {mail}", {"name": "contact", "mail": "email"}),
           ("[User|Login|Account] {ident}[, real name| is| belongs to] {name}[,| and has] [the mail|email|address] {mail}", {"ident": "user", "name": "name", "mail": "email"}),
           ("[Flight|Train|Bus] {code} from {city} to {city2}", {"code": "number", "city": "from", "city2": "to"}),
           ("{name} [turned|is|became] {age}[ years old|] and [comes|moved|is] from {city}", {"name": "name", "age": "age", "city": "city"}),
           ("[Room|Table|Seat] {count} [for|is taken by|was given to] {name}[, reference| with booking|, code] {code}", {"count": "room", "name": "guest", "code": "booking"}),
           ("{count} [boxes|pieces|bags|units|packs] of {word} for {price} [euros|dollars]", {"count": "quantity", "word": "product", "price": "price"}),
           ("[The book|The film|The song] {word} by {name}[,| came out in| from] {year}", {"word": "title", "name": "author", "year": "year"}),
           ("{name} [called|wrote|came] on {day} about [order|case|ticket] {code}", {"name": "caller", "day": "day", "code": "case"}),
           ("[In|At] {city}, {name} [signed|sent|left|paid] {code}", {"city": "place", "name": "person", "code": "document"}),
("{name} is {age} years old.", {"name": "name", "age": "age"}),
           ("{name} is {age} years old and lives in {city}.", {"name": "name", "age": "age", "city": "city"}),
           ("My name is {name}, I am {age} and I live in {city}.", {"name": "name", "age": "age", "city": "city"}),
           ("{name} is a {job} from {city}.", {"name": "name", "job": "job", "city": "city"}),
           ("{name}, a {job}, is {age} years old.", {"name": "name", "job": "job", "age": "age"}),
           ("I would like {count} {item}s, please.", {"item": "item", "count": "quantity"}),
           ("The {color} {item} costs {price} euros.", {"item": "item", "color": "color", "price": "price"}),
           ("{name} bought a {item} for {price} euros.", {"name": "buyer", "item": "item", "price": "price"}),
           ("The meeting with {name} is on {day} at {hour}:00.", {"name": "person", "day": "day", "hour": "hour"}),
           ("{name} goes to {city} on {day}.", {"name": "name", "city": "destination", "day": "day"}),
           ("It is {degrees} degrees in {city}.", {"city": "city", "degrees": "temperature"})],
    "fr": [("[Client|Élève|Patient|Membre|Chauffeur|Invité] {name}, [de|à|vivant à] {city}, [code|numéro|carte] {code}", {"name": "nom", "city": "ville", "code": "code"}),
           ("{name} [commande|achète|veut|prend] {count} {word} à {price} [euros|dollars|francs] pièce", {"name": "client", "count": "quantité", "word": "article", "price": "prix"}),
           ("[La commande|La facture|Le ticket|Le dossier] {code} [est pour|va à|appartient à|vient de] {name}", {"code": "commande", "name": "nom"}),
           ("[Écrire à|Joindre|Contacter] {name} [à|sous|avec] {mail}", {"name": "contact", "mail": "email"}),
           ("[Utilisateur|Compte|Identifiant] {ident}[, vrai nom| est à| appartient à] {name}[,| et a] [le mail|email|adresse] {mail}", {"ident": "utilisateur", "name": "nom", "mail": "email"}),
           ("[Vol|Train|Bus] {code} de {city} à {city2}", {"code": "numéro", "city": "départ", "city2": "arrivée"}),
           ("{name} [fête ses|a eu|atteint] {age} ans et [vient|arrive|est] de {city}", {"name": "nom", "age": "âge", "city": "ville"}),
           ("[Chambre|Table|Place] {count} [pour|prise par|donnée à] {name}[, référence|, réservation|, code] {code}", {"count": "chambre", "name": "client", "code": "réservation"}),
           ("{count} [cartons|morceaux|sacs|unités|paquets] de {word} pour {price} [euros|dollars]", {"count": "quantité", "word": "produit", "price": "prix"}),
           ("[Le livre|Le film|Le disque] {word} de {name}[,| est sorti en] {year}", {"word": "titre", "name": "auteur", "year": "année"}),
           ("{name} [appelle|écrit|vient] {jour} pour [la commande|le dossier|le ticket] {code}", {"name": "nom", "jour": "jour", "code": "dossier"}),
           ("À {city}, {name} [signe|envoie|laisse|paie] {code}", {"city": "lieu", "name": "personne", "code": "document"}),
           ("{name} a {age} ans.", {"name": "nom", "age": "age"}),
           ("{name} a {age} ans et habite à {city}.", {"name": "nom", "age": "age", "city": "ville"}),
           ("Je m'appelle {name}, j'ai {age} ans et je vis à {city}.", {"name": "nom", "age": "age", "city": "ville"}),
           ("{name} est {métier} à {city}.", {"name": "nom", "métier": "métier", "city": "ville"}),
           ("La {article} {couleur} coûte {price} euros.", {"article": "article", "couleur": "couleur", "price": "prix"}),
           ("Le rendez-vous avec {name} est {jour} à {hour} heures.", {"name": "personne", "jour": "jour", "hour": "heure"}),
           ("Il fait {degrees} degrés à {city}.", {"city": "ville", "degrees": "température"})],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call, how people ask for it, and how its result is told.

    Attributes:
        params, results: name -> kind of value, see `corpus.value`.
        ask: wordings by language, with the parameters as fields; `answer`: the sentence about the result, likewise.
    """

    name: str
    params: dict[str, str]
    description: str
    ask: dict[str, list[str]]
    result: str = ""
    results: dict[str, str] = field(default_factory=dict)
    answer: dict[str, str] = field(default_factory=dict)


def _tool(name: str, params: str, description: str, en: str, fr: str, results: str = "", answers: str = "|") -> Tool:
    kinds = {p.partition(":")[0]: p.rpartition(":")[2] for p in params.split()}
    out = dict(p.split(":") for p in results.split())
    answer = dict(zip(("en", "fr"), answers.split("|"), strict=True))
    return Tool(name, kinds, description, {"en": en.split("|"), "fr": fr.split("|")}, results, out, answer)


TOOLS: Final = [
    _tool("get_weather", "city", "Get the current weather in a city",
          "What is the weather in {city}?|How is the weather in {city} today?|Is it sunny in {city}?|Weather in {city}?|"
          "Tell me the weather in {city}.|What's the weather like in {city}?|Is it raining in {city}?",
          "Quel temps fait-il à {city} ?|Quelle est la météo à {city} ?|Donne-moi la météo à {city}.|Pleut-il à {city} ?",
          "temperature:degrees condition:sky", "In {city} it is {temperature} degrees and {condition}.|"
          "À {city}, il fait {temperature} degrés et le temps est {condition}."),
    _tool("get_time", "city", "Get the local time in a city",
          "What time is it in {city}?|Tell me the time in {city}.|What is the local time in {city}?|Time in {city}?",
          "Quelle heure est-il à {city} ?|Donne-moi l'heure à {city}.|Il est quelle heure à {city} ?",
          "time:clock", "It is {time} in {city}.|Il est {time} à {city}."),
    _tool("add", "a:int b:int", "Add two numbers", "What is {a}+{b}?|Add {a} and {b}.|How much is {a} plus {b}?|{a} + {b}",
          "Combien font {a}+{b} ?|Additionne {a} et {b}.|Combien font {a} plus {b} ?", "sum:int",
          "The sum is {sum}.|La somme est {sum}."),
    _tool("search", "query", "Search the web", "Search for {query}.|Find information about {query}.|Look up {query}.|"
          "Search the web for {query}.|Can you search for {query}?", "Cherche {query}.|Recherche {query} sur le web.|"
          "Trouve des informations : {query}.", "results:count", "I found {results} results for {query}.|"
          "J'ai trouvé {results} résultats pour {query}."),
    _tool("send_email", "to:name subject", "Send an email", "Send an email to {to} about {subject}.|Write to {to} about "
          "{subject}.|Email {to} about {subject}.|Can you send {to} an email about {subject}?",
          "Envoie un e-mail à {to} : {subject}.|Écris à {to} au sujet de ceci : {subject}."),
    _tool("set_timer", "minutes", "Set a timer", "Set a timer for {minutes} minutes.|Start a {minutes} minute timer.|"
          "Remind me in {minutes} minutes.|Timer: {minutes} minutes", "Mets un minuteur de {minutes} minutes.|"
          "Préviens-moi dans {minutes} minutes."),
    _tool("play_music", "song", "Play a song", "Play {song}.|Please play {song}.|I want to hear {song}.|Can you play {song}?",
          "Joue {song}.|Mets {song}.|Je veux écouter {song}."),
    _tool("turn_on", "device", "Turn on a device", "Turn on the {device}.|Switch on the {device}.|Please turn on the {device}.",
          "Allume : {device}.|Peux-tu allumer ceci : {device} ?"),
    _tool("convert_currency", "amount from:currency to:currency", "Convert an amount of money",
          "Convert {amount} {from} to {to}.|How much is {amount} {from} in {to}?|What is {amount} {from} in {to}?",
          "Convertis {amount} {from} en {to}.|Combien font {amount} {from} en {to} ?", "result:amount",
          "{amount} {from} is {result} {to}.|{amount} {from} font {result} {to}."),
    _tool("translate_text", "text:word language", "Translate a text", "Translate {text} into {language}.|"
          "Use the tool to translate {text} into {language}.", "Traduis {text} avec l'outil ({language})."),
    _tool("book_table", "name people:count", "Book a table in a restaurant", "Book a table for {people} people under the "
          "name {name}.|Reserve a table for {people}, name {name}.", "Réserve une table pour {people} au nom de {name}."),
    _tool("get_population", "city", "Get the population of a city", "How many people live in {city}?|What is the population "
          "of {city}?|Population of {city}?", "Combien d'habitants a {city} ?|Quelle est la population de {city} ?",
          "population:amount", "{city} has {population} thousand inhabitants.|{city} a {population} mille habitants."),
    _tool("find_user", "name", "Look up a user by name", "Find the user {name}.|Look up the user {name}.|How old is the user "
          "{name}?", "Trouve l'utilisateur {name}.|Cherche l'utilisateur {name}.", "age:age",
          "The user {name} is {age} years old.|L'utilisateur {name} a {age} ans."),
]  # fmt: skip
REPEAT: Final = {"en": ["Repeat after me: {x}", "Say {x}", "Repeat: {x}", "Please say: {x}", 'Repeat "{x}"', "Write {x}"],
                 "fr": ["Répète après moi : {x}", "Dis {x}", "Répète : {x}", "Répète « {x} »", "Écris {x}"]}  # fmt: skip
MEMORY: Final[list[Known]] = [
    {"kind": ["name"], "tell en": ["My name is {x}.", "I am {x}.", "Hello, my name is {x}.", "Call me {x}.", "Hi, I'm {x}."],
     "tell fr": ["Je m'appelle {x}.", "Je suis {x}.", "Bonjour, je m'appelle {x}.", "Mon nom est {x}.", "Appelle-moi {x}."],
     "told en": ["Nice to meet you, {x}!"], "told fr": ["Enchanté, {x} !"],
     "recall en": ["What is my name?", "Who am I?", "Do you know my name?", "Do you remember my name?", "What's my name?"],
     "recall fr": ["Quel est mon nom ?", "Comment je m'appelle ?", "Qui suis-je ?", "Te souviens-tu de mon nom ?"],
     "recalled en": ["Your name is {x}."], "recalled fr": ["Vous vous appelez {x}."]},
    {"kind": ["city"], "tell en": ["I live in {x}.", "I am from {x}.", "My home is in {x}.", "Hi, I live in {x}."],
     "tell fr": ["J'habite à {x}.", "Je vis à {x}.", "Bonjour, j'habite à {x}."],
     "told en": ["{x}, I will remember that."], "told fr": ["{x}, je m'en souviendrai."],
     "recall en": ["Where do I live?", "Where am I from?", "Which city do I live in?", "Do you know where I live?"],
     "recall fr": ["Où est-ce que j'habite ?", "Où est-ce que je vis ?", "Dans quelle ville j'habite ?"],
     "recalled en": ["You live in {x}."], "recalled fr": ["Vous habitez à {x}."]},
    {"kind": ["name"], "system en": ["Your name is {x}.", "You are {x}, a helpful assistant.", "You are {x}."],
     "system fr": ["Tu t'appelles {x}.", "Tu es {x}, un assistant utile.", "Tu es {x}."],
     "recall en": ["What is your name?", "Who are you?", "What's your name?"],
     "recall fr": ["Quel est ton nom ?", "Qui es-tu ?", "Comment t'appelles-tu ?"],
     "recalled en": ["My name is {x}."], "recalled fr": ["Je m'appelle {x}."]},
]  # fmt: skip

NEUTRAL_SYSTEM: Final = {
    "en": ["You are a helpful assistant.", "You are a helpful assistant.", "You are a friendly assistant. Be brief.",
           "You are a concise assistant.", "Be polite.", "You answer questions about PyLLM.", "Answer briefly.",
           "You are an assistant that helps users with their questions.", "You are a helpful AI assistant."],
    "fr": ["Tu es un assistant utile.", "Vous êtes un assistant utile.", "Tu es un assistant concis.", "Sois poli.",
           "Tu réponds aux questions sur PyLLM.", "Réponds brièvement."],
}  # fmt: skip
LANGUAGE_SYSTEM: Final = {
    "en": ["Answer in English.", "Reply in English.", "Always answer in English.", "Réponds en anglais."],
    "fr": ["Answer in French.", "Réponds en français.", "Always answer in French.", "Répondez toujours en français.",
           "You are a helpful assistant that answers in French.", "Reply in French."],
}  # fmt: skip

FIRST: Final = {
    "en": [("Hello!", "greeting"), ("What is 7+5?", "sum"), ("How do I stream a response?", "help"), ("Who are you?", "identity"),
           ("What can you do?", "identity"), ("What is PyLLM?", "help")],
    "fr": [("Bonjour !", "greeting"), ("Combien font 7+5 ?", "sum"), ("Comment diffuser une réponse ?", "help"),
           ("Comment recevoir la réponse en streaming ?", "help"), ("Qui es-tu ?", "identity"), ("Que sais-tu faire ?", "identity")],
}  # fmt: skip
"""The README's and the tests' questions, which are always in the training set."""

LOOSE_FRAMES: Final = {
    "en": ["{x}", "{x}", "{x}?", "{x}, how?", "{x}, how does that work?", "{x}: how?", "I need {x}.", "I'd like {x}.", "question about {x}",
           "what about {x}?", "help with {x}.", "{x}, is that possible?", "{x}, please", "{x}, which option?", "{x}, what do I do?",
           "with this server, {x}?", "my problem: {x}", "I look for {x}.", "{x} with PyLLM", "anything for {x}?", "{x}, where?", "the docs on {x}?"],
    "fr": ["{x}", "{x}", "{x} ?", "{x}, comment ?", "{x}, comment ça marche ?", "{x} : comment ?", "il me faut {x}.", "je voudrais {x}.",
           "question sur {x}", "et {x} ?", "aide pour {x}.", "{x}, est-ce possible ?", "{x}, s'il te plaît", "{x}, quelle option ?",
           "{x}, que faire ?", "avec ce serveur, {x} ?", "mon problème : {x}", "je cherche {x}.", "{x} avec PyLLM", "{x}, où ?"],
}  # fmt: skip
OTHER_PLACES: Final = {
    "en": ["Mars", "Atlantis", "Narnia", "Texas", "California", "Bavaria", "Siberia", "Mongolia", "Nepal", "Bolivia", "Paraguay", "Ecuador",
           "Jamaica", "Haiti", "Angola", "Ghana", "Nigeria", "Mali", "Chad", "Sudan", "Uganda", "Rwanda", "Zambia", "Malta", "Cyprus", "Monaco",
           "Georgia", "Armenia", "Kazakhstan", "Pakistan", "Malaysia", "Laos", "Cambodia", "Fiji", "Samoa", "Qatar", "Oman", "Yemen", "Syria",
           "Jordan", "Libya", "Somalia", "Panama", "Honduras", "Guatemala", "Belarus", "Moldova", "Bosnia", "Andorra", "Wales", "the moon",
           "Gondor", "Africa", "Asia", "Brittany", "Tuscany", "Oregon", "Ohio", "Quebec", "Tibet"],
    "fr": ["Mars", "l'Atlantide", "Narnia", "Texas", "Californie", "Bavière", "Sibérie", "Mongolie", "Népal", "Bolivie", "Paraguay", "Équateur",
           "Jamaïque", "Haïti", "Angola", "Ghana", "Nigéria", "Mali", "Tchad", "Soudan", "Ouganda", "Rwanda", "Zambie", "Malte", "Chypre", "Monaco",
           "Géorgie", "Arménie", "Kazakhstan", "Pakistan", "Malaisie", "Laos", "Cambodge", "Fidji", "Samoa", "Qatar", "Oman", "Yémen", "Syrie",
           "Jordanie", "Libye", "Somalie", "Panama", "Honduras", "Guatemala", "Biélorussie", "Moldavie", "Bosnie", "Andorre", "pays de Galles",
           "la lune", "Gondor", "l'Afrique", "l'Asie", "Bretagne", "Toscane", "Oregon", "Ohio", "Québec", "Tibet"],
}  # fmt: skip
UNKNOWN_TOPICS: Final = {
    "en": ["[quantum|modern|nuclear|solar] physics", "the [French|Russian|industrial] revolution", "photosynthesis", "the [stock|housing|oil] market", "football", "chess", "gravity",
           "black holes", "philosophy", "democracy", "the internet", "evolution", "climate change", "the Roman Empire", "machine learning", "love", "the meaning of life", "bitcoin",
           "cancer", "music theory", "the moon landing", "relativity", "politics", "the economy", "a good recipe", "cooking pasta", "losing weight", "DNA", "volcanoes", "electricity",
           "a binary tree", "the telephone", "Napoleon", "Shakespeare", "Einstein", "transformers", "the [first|second] world war", "yoga", "the violin concerto", "the light bulb", "the pyramids",
           "the Mona Lisa", "Romeo and Juliet", "the ninth symphony", "oxygen", "insulin", "the steam age", "vaccines", "poker", "opera", "the human [brain-like mind|body]", "inflation", "taxes", "psychology"],
    "fr": ["la physique [quantique|moderne|nucléaire]", "la révolution [française|russe|industrielle]", "la photosynthèse", "la bourse", "le football", "les échecs", "la gravité", "les trous noirs",
           "la philosophie", "la démocratie", "internet", "l'évolution", "le climat", "l'Empire romain", "l'amour", "le sens de la vie", "le bitcoin", "la relativité", "la politique", "l'économie",
           "les volcans", "l'électricité", "le téléphone", "Napoléon", "Victor Hugo", "Einstein", "la cuisine", "la [première|deuxième] guerre mondiale", "le yoga", "l'ampoule", "les pyramides",
           "la Joconde", "Roméo et Juliette", "la neuvième symphonie", "l'oxygène", "l'insuline", "les vaccins", "le poker", "l'opéra", "le corps humain", "l'inflation", "les impôts", "la psychologie", "l'ADN"],
}  # fmt: skip
JSON_QUESTIONS: Final = {
    "en": ["[Give|Return|Output|Write|Create|Build|Produce|Print] [a|one] JSON object with [|the |the fields |the keys |only ]{fields}[:| for:| from:| about:| from this:] {text}", "[Extract|Pull|Read|Find|Get|Take] {fields} [as|in|into] JSON[:| from:| out of:] {text}", "{text}. [Give|Return|Put|Store|Write|Save|Format|Say] [{fields}|{fields} of this|this with {fields}] [as|in] JSON",
           "[Fill|Make|Complete] [a|the] JSON object with {fields} [from|using|for]: {text}", "[Turn|Change|Put|Make|Format|Parse] [this|the following|it|the text] [into|to|as] JSON with [|keys |fields |the keys ]{fields}: {text}", "{text}. [Answer|Reply] [|only ][as|in] JSON with {fields}", "JSON [with|of|having|for|using] {fields}: {text}", "JSON, [fields|keys] {fields}: {text}", "{text} -> JSON [with |keys |fields |]{fields}", "{fields} as JSON: {text}", "{text}. JSON [with|keys|fields|, please,] {fields}", "[From|Out of|Given] [this|the|a] [sentence|text|message|entry], [write|give|fill] [a JSON object|JSON] with {fields}: {text}"],
    "fr": ["[Donne|Renvoie|Écris|Crée|Produis|Affiche|Prépare] [un|cet] objet JSON avec [|les champs |les clés |seulement ]{fields} [:|pour :|depuis :|sur :|à partir de :] {text}", "[Extrais|Tire|Lis|Trouve|Prends] {fields} en JSON [:|de :|depuis :] {text}", "{text}. [Donne|Renvoie|Mets|Écris|Garde|Formate|Dis] {fields} en JSON",
           "[Remplis|Fais|Complète] [un|l'] objet JSON avec {fields} [à partir de|depuis|pour] : {text}", "[Transforme|Change|Mets|Formate|Tourne] [ceci|le texte|cela|ça] en JSON avec [|les clés |les champs ]{fields} : {text}", "{text}. Réponds [|seulement ]en JSON avec {fields}", "JSON [avec|de|pour] {fields} : {text}", "JSON, [champs|clés] {fields} : {text}", "{text} -> JSON [avec |clés |champs |]{fields}", "{fields} en JSON : {text}", "{text}. JSON [avec|clés|champs|, s'il te plaît,] {fields}", "[De|Dans|Depuis] [ce|le] [texte|message], [écris|donne|remplis] [un objet JSON|du JSON] avec {fields} : {text}"],
}  # fmt: skip
JSON_SYSTEM: Final = {
    "en": ["Answer with a JSON object with the fields {fields}.", "Extract {fields} from the message as JSON.",
           "You are a data extractor. Reply only with JSON with {fields}."],
    "fr": ["Réponds par un objet JSON avec les champs {fields}.", "Extrais {fields} du message en JSON."],
}  # fmt: skip
FIELDS: Final = {
    "en": ("name city age code price quantity email order id user product title year owner sender receiver address reference priority room number status "
           "amount total phone author category label key start end place person client customer ticket account login company country project "
           "from to destination colour size").split(),
    "fr": ("nom ville âge code prix quantité email commande id utilisateur produit titre année propriétaire expéditeur destinataire adresse référence priorité "
           "chambre numéro statut montant total téléphone auteur catégorie clé début fin lieu personne client ticket compte société pays projet départ "
           "arrivée couleur taille").split(),
}  # fmt: skip
FIELD_FORMS: Final = {
    "en": ["{name} {value}", "{name}: {value}", "{name} = {value}", "the {name} is {value}", "{value} is the {name}", "{name} is {value}", "{value} as {name}", "{value} ({name})", "with {name} {value}", "its {name}, {value}"],
    "fr": ["{name} {value}", "{name} : {value}", "{name} = {value}", "le {name} est {value}", "{value} est le {name}", "{name} est {value}", "{value} comme {name}", "{value} ({name})", "avec {name} {value}", "son {name}, {value}"],
}  # fmt: skip
TOOL_VERBS: Final = "get find open read check update create list load count print start stop move copy paint close track follow lock send save cancel show book".split()
TOOL_NOUNS: Final = ("recipe order file room invoice user account photo song movie book page task note event price parcel report table ship letter box car light "
                     "alarm contract seat member card bill server job team meeting").split()  # fmt: skip
TOOL_PARAMS: Final = {
    "word": ["title", "item", "key", "topic", "label", "value"], "name": ["name", "owner", "user", "person", "to"], "city": ["city", "place", "location"],
    "count": ["number", "count", "page", "priority", "people", "minutes"], "code": ["code", "id", "reference", "number"], "ident": ["login", "tag", "account", "file"],
    "mail": ["email", "to", "address"],
}  # fmt: skip
PARAM_FORMS: Final = {"en": ["{value}", "{value}", "{name} {value}", "{name} {value}", "{name}: {value}", "{value} as {name}"],
                      "fr": ["{value}", "{value}", "{name} {value}", "{name} {value}", "{name} : {value}", "{value} comme {name}"]}  # fmt: skip
TOOL_FRAMES: Final = {
    "en": ["Use {name} with {values}", "Call {name} for {values}", "[Please |]{verb} the {noun} for {values}", "{verb} the {noun}: {values}", "Can you {verb} the {noun} with {values}?", "Run {name} on {values}",
           "{verb} {noun} {values}", "{noun} {values}, {verb} it", "I [want|need] to {verb} [the|a|my] {noun}: {values}", "The {noun} {values} [should|must] be handled: {verb}", "[My|A|The] {noun}: {values}", "What about [the|my] {noun} {values}?", "{values}: {verb} [this|that|the] {noun}", "Where is [the|my] {noun} {values}?", "[There is|It is about] a {noun} [for|with|of] {values}"],
    "fr": ["Utilise {name} avec {values}", "Appelle {name} pour {values}", "Lance {name} : {values}", "Peux-tu utiliser {name} avec {values} ?", "{name} {values}", "[Il faut|Je veux] {name} : {values}", "[Avec|Par] {name}, traite {values}", "[Mon|Le|Un] {noun} : {values}", "Et [mon|le] {noun} {values} ?", "{values} : {name}", "Fais {name} pour {values}", "[Il s'agit d'|C'est pour ]un {noun} avec {values}"],
}  # fmt: skip
