/*
 * What the guest's programs share: a line on the console, naps, patterns, options.
 *
 * Every line goes to /dev/kmsg as one record, so that it reaches the console
 * whole whatever the kernel prints at the same time.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int kmsg = -1;

static inline void say(const char *format, ...)
{
	char line[512];
	va_list arguments;
	/* "<4>": warnings are on the console at every usual log level. */
	int used = snprintf(line, sizeof line, "<4>" PROGRAM ": ");

	va_start(arguments, format);
	used += vsnprintf(line + used, sizeof line - used, format, arguments);
	va_end(arguments);
	if (write(kmsg, line, used) != used)
		_exit(3);
}

static inline void die(const char *what)
{
	say("FAILED %s: %s", what, strerror(errno));
	for (;;)
		pause();
}

static inline uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

/* The base of a page's pattern: depends on the seed and on which page it is. */
static inline uint64_t page_base(uint64_t seed, uint64_t page)
{
	return mix(seed + mix(page + 0x9e3779b97f4a7c15ull));
}

/* A word of the pattern; every bit depends on every bit of the base. */
static inline uint64_t pattern(uint64_t base, uint64_t word)
{
	uint64_t x = (base + word * 0x9e3779b97f4a7c15ull) * 0xff51afd7ed558ccdull;

	return x ^ (x >> 29);
}

static inline void nap(long ms)
{
	struct timespec time = { ms / 1000, ms % 1000 * 1000000 };

	nanosleep(&time, NULL);
}
