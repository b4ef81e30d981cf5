// Java's own HTTP client as it is by default: it asks for HTTP/2 with each request. The names of methods below are tests.
import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.stream.IntStream;

public class Client {
    static final HttpClient client = HttpClient.newHttpClient();
    static final String fields = "\"model\": \"tiny\", \"prompt\": \"Hi\", \"temperature\": 0, \"ignore_eos\": true";
    static final String body = "{" + fields + ", \"max_tokens\": 20}";
    static final String streamed = "{" + fields + ", \"max_tokens\": 20, \"stream\": true}";
    static final String endless = "{" + fields + ", \"max_tokens\": 8000, \"stream\": true}";
    static String url;

    public static void main(String[] arguments) throws Exception {
        url = arguments[0];
        Client.class.getDeclaredMethod(arguments[1]).invoke(null);
    }

    static HttpRequest.Builder request(String path) {
        return HttpRequest.newBuilder(URI.create(url + path)).header("content-type", "application/json");
    }

    static HttpRequest post(BodyPublisher content) {
        return request("/v1/completions").POST(content).build();
    }

    static HttpRequest post(String content) {
        return post(BodyPublishers.ofString(content));
    }

    static void expect(boolean condition, Object seen) {
        if (!condition) throw new AssertionError(seen);
    }

    /** The answer's first text. */
    static String text(HttpResponse<String> answer) {
        expect(answer.statusCode() == 200, answer.body());
        expect(answer.version() == HttpClient.Version.HTTP_1_1, answer.version());
        return texts(answer.body());
    }

    /** All texts of completions in JSON, one after the other, as they are spelled there. */
    static String texts(String json) {
        var found = new StringBuilder();
        var matcher = java.util.regex.Pattern.compile("\"text\":\"((?:[^\"\\\\]|\\\\.)*)\"").matcher(json);
        while (matcher.find()) found.append(matcher.group(1));
        return found.toString();
    }

    static void answers() throws Exception {
        var first = text(client.send(post(body), BodyHandlers.ofString()));
        expect(!first.isEmpty(), first);
        for (int n = 0; n < 5; n++) expect(first.equals(text(client.send(post(body), BodyHandlers.ofString()))), n);
    }

    static void lists_the_models() throws Exception {
        var answer = client.send(request("/v1/models").GET().build(), BodyHandlers.ofString());
        expect(answer.statusCode() == 200 && answer.body().contains("\"tiny\""), answer.body());
    }

    static void sends_in_chunks() throws Exception {
        var whole = text(client.send(post(body), BodyHandlers.ofString()));
        var chunks = BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(body.getBytes()));
        expect(whole.equals(text(client.send(post(chunks), BodyHandlers.ofString()))), whole);
    }

    static void sends_when_it_may() throws Exception {
        var whole = text(client.send(post(body), BodyHandlers.ofString()));
        var polite = request("/v1/completions").expectContinue(true).POST(BodyPublishers.ofString(body)).build();
        expect(whole.equals(text(client.send(polite, BodyHandlers.ofString()))), whole);
    }

    static void sends_much() throws Exception {
        var large = body + " ".repeat(2_000_000);
        expect(text(client.send(post(body), BodyHandlers.ofString()))
            .equals(text(client.send(post(large), BodyHandlers.ofString()))), "another text");
    }

    static void sends_many_at_once() throws Exception {
        var whole = text(client.send(post(body), BodyHandlers.ofString()));
        List<CompletableFuture<HttpResponse<String>>> answers = IntStream.range(0, 16)
            .mapToObj(n -> client.sendAsync(post(body), BodyHandlers.ofString())).toList();
        for (var answer : answers) expect(whole.equals(text(answer.get())), whole);
    }

    static void streams() throws Exception {
        var whole = text(client.send(post(body), BodyHandlers.ofString()));
        for (int n = 0; n < 3; n++) {
            var answer = client.send(post(streamed), BodyHandlers.ofLines());
            expect(answer.statusCode() == 200, answer.statusCode());
            var kind = answer.headers().firstValue("content-type").orElse("");
            expect(kind.startsWith("text/event-stream"), kind);
            var events = answer.body().filter(line -> !line.isEmpty()).toList();
            expect(events.stream().allMatch(event -> event.startsWith("data: ")), events);
            expect(events.size() > 2 && events.get(events.size() - 1).equals("data: [DONE]"), events);
            expect(whole.equals(texts(String.join("\n", events))), events);
        }
    }

    static void ends_a_stream_early() throws Exception {
        try (var stream = client.send(post(endless), BodyHandlers.ofInputStream()).body()) {
            expect(new String(stream.readNBytes(6)).equals("data: "), "no stream");
        }
    }

    static void sees_errors() throws Exception {
        for (var wrong : List.of("{", body.replace("tiny", "none"), body.replace("\"Hi\"", "7"))) {
            var answer = client.send(post(wrong), BodyHandlers.ofString());
            expect(answer.statusCode() == (wrong.contains("none") ? 404 : 400), answer.body());
            expect(answer.body().contains("\"message\""), answer.body());
        }
        expect(!text(client.send(post(body), BodyHandlers.ofString())).isEmpty(), "nothing");
    }
}
