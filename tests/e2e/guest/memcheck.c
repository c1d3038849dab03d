/*
 * memcheck: fills most of a guest's memory with a known pattern and verifies
 * it in a loop. Runs as the guest's first process.
 *
 * One worker process for each vCPU, pinned to it, each with its share of the
 * memory and therefore with page tables and a CR3 of its own. The parent
 * measures the largest gap between two 10 ms ticks and reports.
 *
 * It says on the console:
 *
 *   memcheck: boot id=UUID
 *   memcheck: start workers=N pages=P leave_mib=M
 *   memcheck: pass N ok pages=P gap_ms=G seed=S
 *   memcheck: pass N BAD pages=P gap_ms=G seed=S mismatches=T
 *   memcheck: pfns worker=W PFN...   (in hexadecimal: where some of its pages are)
 *   memcheck: MISMATCH worker=W page=I offset=O want=X got=Y pass=N
 *
 * "pass N" means that every worker has completed its N-th pass. A page is
 * only rewritten right after it was verified, so damage is never covered up.
 *
 * Kernel command line:
 *   memcheck.leave_mib=16     memory left to the kernel
 *   memcheck.workers=0        workers; 0: one for each vCPU
 *   memcheck.rewrite_every=4  every so many passes write a new pattern
 *   memcheck.nap_ms=500       pause of each worker between two passes
 *   memcheck.damage_at=0      flip one bit before this pass, to see that it is found
 */
#define _GNU_SOURCE
#define PROGRAM "memcheck"
#include "common.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>

enum { PAGE = 4096, WORDS = PAGE / 8, MAX_WORKERS = 64, REPORTED = 8, TICK_MS = 10, SAMPLES = 32,
       PER_LINE = 16 };

struct progress {
	volatile uint64_t passes;
	volatile uint64_t mismatches;
	volatile uint64_t seed;
	char pad[104]; /* workers do not share cache lines */
};

struct settings {
	long leave_mib, workers, rewrite_every, nap_ms, damage_at;
};

static void fill(uint64_t *words, uint64_t seed, uint64_t page)
{
	uint64_t base = page_base(seed, page);

	for (unsigned word = 0; word < WORDS; word++)
		words[word] = pattern(base, word);
}

static uint64_t now_ms(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * 1000ull + time.tv_nsec / 1000000;
}

static long option(const char *line, const char *name, long otherwise)
{
	const char *found = strstr(line, name);

	return found ? strtol(found + strlen(name), NULL, 10) : otherwise;
}

static struct settings read_settings(void)
{
	char line[4096] = "";
	int file = open("/proc/cmdline", O_RDONLY);

	if (file < 0 || read(file, line, sizeof line - 1) < 0)
		die("/proc/cmdline");
	close(file);
	struct settings settings = {
		.leave_mib = option(line, "memcheck.leave_mib=", 16),
		.workers = option(line, "memcheck.workers=", 0),
		.rewrite_every = option(line, "memcheck.rewrite_every=", 4),
		.nap_ms = option(line, "memcheck.nap_ms=", 500),
		.damage_at = option(line, "memcheck.damage_at=", 0),
	};
	if (settings.workers <= 0)
		settings.workers = sysconf(_SC_NPROCESSORS_ONLN);
	if (settings.workers > MAX_WORKERS)
		settings.workers = MAX_WORKERS;
	if (settings.rewrite_every <= 0)
		settings.rewrite_every = 4;
	return settings;
}

/* Verify one page; the number of wrong words. Wrong words are put right, so that each counts once. */
static unsigned verify(uint64_t *words, uint64_t seed, uint64_t page, int worker,
		       struct progress *mine)
{
	uint64_t base = page_base(seed, page);
	unsigned wrong = 0;

	for (unsigned word = 0; word < WORDS; word++) {
		uint64_t want = pattern(base, word), got = words[word];

		if (__builtin_expect(want == got, 1))
			continue;
		if (mine->mismatches + wrong < REPORTED)
			say("MISMATCH worker=%d page=%llu offset=%u want=%016llx got=%016llx "
			    "pass=%llu", worker, (unsigned long long)page, word * 8,
			    (unsigned long long)want, (unsigned long long)got,
			    (unsigned long long)mine->passes + 1);
		words[word] = want;
		wrong++;
	}
	return wrong;
}

/* Say where some pages are, evenly spread, so that a test can pick one that matters. */
static void locate(int worker, uint64_t *memory, uint64_t pages)
{
	int file = open("/proc/self/pagemap", O_RDONLY);
	char line[PER_LINE * 10 + 1];
	int used = 0;

	if (file < 0)
		die("/proc/self/pagemap");
	for (int sample = 0; sample < SAMPLES; sample++) {
		uint64_t entry, page = pages * sample / SAMPLES;
		off_t offset = ((uintptr_t)memory / PAGE + page) * sizeof entry;

		if (pread(file, &entry, sizeof entry, offset) != sizeof entry)
			die("reading pagemap");
		used += snprintf(line + used, sizeof line - used, " %llx",
				 (unsigned long long)(entry & ((1ull << 55) - 1)));
		if ((sample + 1) % PER_LINE == 0) {
			say("pfns worker=%d%s", worker, line);
			used = 0;
		}
	}
	close(file);
}

static void work(int worker, uint64_t pages, const struct settings *settings,
		 struct progress *mine)
{
	uint64_t seed = mix(getpid() + 1000003ull * worker), first = (uint64_t)worker << 32;
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(worker % sysconf(_SC_NPROCESSORS_ONLN), &cpus);
	sched_setaffinity(0, sizeof cpus, &cpus);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		die("mmap");
	for (uint64_t page = 0; page < pages; page++)
		fill(memory + page * WORDS, seed, first + page);
	mine->seed = seed;
	locate(worker, memory, pages);
	for (;;) {
		if (settings->damage_at && (long)mine->passes + 1 == settings->damage_at)
			memory[pages / 2 * WORDS + 17] ^= 1ull << 42;
		int rewrite = (mine->passes + 1) % settings->rewrite_every == 0;
		uint64_t next = rewrite ? mix(seed + 1) : seed;

		for (uint64_t page = 0; page < pages; page++) {
			uint64_t *words = memory + page * WORDS;

			mine->mismatches += verify(words, seed, first + page, worker, mine);
			if (rewrite)
				fill(words, next, first + page);
		}
		mine->seed = seed = next;
		mine->passes++;
		nap(settings->nap_ms);
	}
}

static void report(uint64_t pass, uint64_t pages, uint64_t gap, struct progress *all, long workers)
{
	uint64_t mismatches = 0;

	for (long worker = 0; worker < workers; worker++)
		mismatches += all[worker].mismatches;
	if (mismatches)
		say("pass %llu BAD pages=%llu gap_ms=%llu seed=%016llx mismatches=%llu",
		    (unsigned long long)pass, (unsigned long long)pages, (unsigned long long)gap,
		    (unsigned long long)all[0].seed, (unsigned long long)mismatches);
	else
		say("pass %llu ok pages=%llu gap_ms=%llu seed=%016llx", (unsigned long long)pass,
		    (unsigned long long)pages, (unsigned long long)gap,
		    (unsigned long long)all[0].seed);
}

/* The parent's loop: measure gaps, report passes, notice dead workers. */
static void watch(uint64_t pages, struct progress *all, long workers)
{
	/* BOOTTIME goes on while the guest is suspended, MONOTONIC does not. */
	uint64_t reported = 0, gap = 0, last = now_ms(CLOCK_BOOTTIME);

	for (;;) {
		nap(TICK_MS);
		uint64_t now = now_ms(CLOCK_BOOTTIME), least = UINT64_MAX;

		if (now - last > gap)
			gap = now - last;
		last = now;
		for (long worker = 0; worker < workers; worker++)
			if (all[worker].passes < least)
				least = all[worker].passes;
		for (; reported < least; gap = 0)
			report(++reported, pages, gap, all, workers);
		int status;
		pid_t child = waitpid(-1, &status, WNOHANG);
		if (child > 0)
			say("FAILED worker process %d ended, status %#x", child, status);
	}
}

static void announce(void)
{
	char id[64] = "";
	int file = open("/proc/sys/kernel/random/uuid", O_RDONLY);
	ssize_t size = read(file, id, sizeof id - 1);

	if (size <= 0)
		die("random uuid");
	close(file);
	id[strcspn(id, "\n")] = 0;
	say("boot id=%s", id);
}

int main(void)
{
	kmsg = open("/dev/kmsg", O_WRONLY);
	announce();
	struct settings settings = read_settings();
	struct sysinfo memory;
	sysinfo(&memory);
	uint64_t free_pages = (uint64_t)memory.freeram * memory.mem_unit / PAGE;
	uint64_t left = settings.leave_mib * (1 << 20) / PAGE;
	if (free_pages <= left + settings.workers)
		die("too little memory");
	uint64_t share = (free_pages - left) / settings.workers;
	struct progress *all = mmap(NULL, settings.workers * sizeof *all, PROT_READ | PROT_WRITE,
				    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (all == MAP_FAILED)
		die("mmap");
	say("start workers=%ld pages=%llu leave_mib=%ld", settings.workers,
	    (unsigned long long)share * settings.workers, settings.leave_mib);
	for (int worker = 0; worker < settings.workers; worker++) {
		pid_t child = fork();

		if (child < 0)
			die("fork");
		if (child == 0)
			work(worker, share, &settings, &all[worker]);
	}
	watch(share * settings.workers, all, settings.workers);
}
