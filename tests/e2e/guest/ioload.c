/*
 * ioload: keeps a guest's disk or its network busy, and verifies what comes back.
 *
 *   ioload disk DEVICE    writes all of it and reads it again, for ever
 *   ioload net ADDRESS    sends ICMP echo requests there; the kernel there answers
 *
 * It says on the console:
 *
 *   ioload: disk pass N ok chunks=C mismatches=0
 *   ioload: disk MISMATCH chunk=C offset=O want=X got=Y pass=N
 *   ioload: net pass N ok packets=P lost=L mismatches=0
 *   ioload: net MISMATCH packet=P offset=O want=X got=Y pass=N
 *   ioload: ... pass N BAD ... mismatches=T   (from then on)
 *
 * A pass of the disk has read and rewritten every chunk, one of the network has
 * sent so many packets. Lost packets are no fault: Ethernet may lose them.
 *
 * Kernel command line, read by init, which starts it:
 *   ioload.disk=xvda          the disk to keep busy
 *   ioload.address=A          the network device's address, the first 24 bits the network's
 *   ioload.peer=B             who answers
 */
#define _GNU_SOURCE
#define PROGRAM "ioload"
#include "common.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>

enum { CHUNK = 64 << 10, REPORTED = 8, DISK_NAP_MS = 12,
       PAYLOAD = 1400, BURST = 8, BURSTS = 16, NET_NAP_MS = 40, PATIENCE_MS = 500 };

struct packet {
	struct icmphdr head;
	uint64_t words[PAYLOAD / 8]; /* the first one is the packet's number */
} __attribute__((packed));

static unsigned long long mismatches;

static void mismatch(const char *what, uint64_t number, unsigned word, uint64_t want, uint64_t got,
		     uint64_t pass)
{
	if (mismatches++ < REPORTED)
		say("%s=%llu offset=%u want=%016llx got=%016llx pass=%llu", what,
		    (unsigned long long)number, word * 8, (unsigned long long)want,
		    (unsigned long long)got, (unsigned long long)pass);
}

static void verify_chunk(const uint64_t *words, uint64_t base, uint64_t chunk, uint64_t pass)
{
	for (unsigned word = 0; word < CHUNK / 8; word++)
		if (words[word] != pattern(base, word))
			mismatch("disk MISMATCH chunk", chunk, word, pattern(base, word),
				 words[word], pass);
}

static void disk(const char *device)
{
	uint64_t size, seed = mix(getpid());
	uint64_t *words = aligned_alloc(4096, CHUNK);
	int file = open(device, O_RDWR | O_DIRECT);

	if (file < 0 || !words || ioctl(file, BLKGETSIZE64, &size))
		die(device);
	for (uint64_t pass = 0;; pass++) {
		for (uint64_t chunk = 0; chunk < size / CHUNK; chunk++) {
			uint64_t next = page_base(seed + pass, chunk);

			/* Nothing of ours is there before the first pass. */
			if (pass && pread(file, words, CHUNK, chunk * CHUNK) != CHUNK)
				die("reading the disk");
			if (pass)
				verify_chunk(words, page_base(seed + pass - 1, chunk), chunk, pass);
			for (unsigned word = 0; word < CHUNK / 8; word++)
				words[word] = pattern(next, word);
			if (pwrite(file, words, CHUNK, chunk * CHUNK) != CHUNK)
				die("writing the disk");
			nap(DISK_NAP_MS);
		}
		say("disk pass %llu %s chunks=%llu mismatches=%llu", (unsigned long long)pass,
		    mismatches ? "BAD" : "ok", (unsigned long long)size / CHUNK, mismatches);
	}
}

static uint16_t checksum(const void *data, size_t size)
{
	const uint8_t *bytes = data;
	uint32_t sum = 0;

	for (size_t at = 0; at < size; at += 2)
		sum += bytes[at] | bytes[at + 1] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

static void send_packet(int wire, uint64_t number)
{
	struct packet packet = { .head = { .type = ICMP_ECHO } };
	uint64_t words[PAYLOAD / 8] = { number };

	for (unsigned word = 1; word < PAYLOAD / 8; word++)
		words[word] = pattern(mix(number), word);
	packet.head.un.echo.id = getpid();
	packet.head.un.echo.sequence = number;
	memcpy(packet.words, words, sizeof words);
	packet.head.checksum = checksum(&packet, sizeof packet);
	/* A full queue loses the packet, as a wire may. */
	if (send(wire, &packet, sizeof packet, 0) < 0 && errno != ENOBUFS)
		die("sending");
}

/* Whether it was an answer to us; verifies it. */
static int answer(const char *data, ssize_t size, uint64_t pass)
{
	const struct iphdr *ip = (const void *)data;
	uint64_t words[PAYLOAD / 8];
	struct icmphdr head;

	if (size != ip->ihl * 4 + (ssize_t)sizeof(struct packet))
		return 0;
	memcpy(&head, data + ip->ihl * 4, sizeof head);
	memcpy(words, data + ip->ihl * 4 + sizeof head, sizeof words);
	if (head.type != ICMP_ECHOREPLY || head.un.echo.id != (uint16_t)getpid())
		return 0;
	for (unsigned word = 1; word < PAYLOAD / 8; word++)
		if (words[word] != pattern(mix(words[0]), word))
			mismatch("net MISMATCH packet", words[0], word,
				 pattern(mix(words[0]), word), words[word], pass);
	return 1;
}

/* So many answers came before we ran out of patience. */
static unsigned receive(int wire, unsigned wanted, uint64_t pass)
{
	char data[2048];
	unsigned came = 0;

	while (came < wanted) {
		ssize_t size = recv(wire, data, sizeof data, 0);

		if (size < 0 && errno != EAGAIN && errno != EINTR)
			die("receiving");
		if (size < 0)
			break;
		came += answer(data, size, pass);
	}
	return came;
}

static void net(const char *address)
{
	struct timeval patience = { .tv_usec = PATIENCE_MS * 1000 };
	struct sockaddr_in peer = { .sin_family = AF_INET };
	int wire = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
	uint64_t number = 0;

	if (wire < 0 || inet_pton(AF_INET, address, &peer.sin_addr) != 1 ||
	    setsockopt(wire, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) ||
	    connect(wire, (struct sockaddr *)&peer, sizeof peer))
		die(address);
	for (uint64_t pass = 1;; pass++) {
		unsigned came = 0, sent = 0;

		/* A pass in which nothing came back is not over. */
		while (sent < BURST * BURSTS || !came) {
			for (unsigned packet = 0; packet < BURST; packet++)
				send_packet(wire, number++);
			sent += BURST;
			came += receive(wire, BURST, pass);
			nap(NET_NAP_MS);
		}
		say("net pass %llu %s packets=%u lost=%d mismatches=%llu", (unsigned long long)pass,
		    mismatches ? "BAD" : "ok", sent, (int)(sent - came), mismatches);
	}
}

int main(int count, char **words)
{
	kmsg = open("/dev/kmsg", O_WRONLY);
	if (count == 3 && !strcmp(words[1], "disk"))
		disk(words[2]);
	if (count == 3 && !strcmp(words[1], "net"))
		net(words[2]);
	say("FAILED: what is it to do?");
	return 1;
}
