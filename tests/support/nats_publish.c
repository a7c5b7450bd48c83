/* Publishes a file to JetStream with the public C client, and waits until the stream has it.
 *
 * usage: nats_publish URL SUBJECT FILE [HEADER VALUE]... */

#include <nats.h>
#include <stdio.h>
#include <stdlib.h>

static void check(natsStatus status, const char *what)
{
    if (status != NATS_OK) {
        fprintf(stderr, "%s: %s\n", what, natsStatus_GetText(status));
        exit(1);
    }
}

int main(int argc, char **argv)
{
    static char image[1 << 20];
    natsConnection *connection = NULL;
    jsCtx *stream = NULL;
    natsMsg *message = NULL;
    jsPubAck *confirmed = NULL;
    FILE *file = argc < 4 ? NULL : fopen(argv[3], "rb");

    if (file == NULL) {
        fprintf(stderr, "usage: nats_publish URL SUBJECT FILE [HEADER VALUE]...\n");
        return 2;
    }
    size_t length = fread(image, 1, sizeof image, file);
    fclose(file);
    check(natsConnection_ConnectTo(&connection, argv[1]), "connecting");
    check(natsConnection_JetStream(&stream, connection, NULL), "JetStream");
    check(natsMsg_Create(&message, argv[2], NULL, image, (int)length), "a message");
    for (int at = 4; at + 1 < argc; at += 2)
        check(natsMsgHeader_Set(message, argv[at], argv[at + 1]), "a header");
    check(js_PublishMsg(&confirmed, stream, message, NULL, NULL), "publishing");
    return 0;
}
