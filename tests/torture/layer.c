/* A layer over the file system, for LD_PRELOAD: it counts what changes files below a folder, and can end the process,
 * send a signal, or refuse, exactly before the n-th of these events; or write all of them to a log.
 *
 * torture_arm(root, at, action, log): root "" disarms; action < 0 raises signal -action, > 0 fails with that errno, once
 * or (at < 0) from event -at on for ever; log "" keeps none. torture_events() is how many there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long at, action, events;
static int log_fd = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) static __typeof__(name) *real_##name; if (!real_##name) real_##name = dlsym(RTLD_NEXT, #name)

void torture_arm(const char *new_root, long new_at, long new_action, const char *log) {
  REAL(open);
  strncpy(root, new_root, sizeof root - 1);
  at = new_at, action = new_action, events = 0;
  log_fd = *log ? real_open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
}

long torture_events(void) { return events; }

static int inside(const char *path) {
  size_t n = strlen(root);
  return n && path && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

static const char *whole(int folder, const char *path, char *into) {
  if (path[0] == '/') return path;
  char link[64], base[PATH_MAX];
  if (folder == AT_FDCWD) strcpy(link, "/proc/self/cwd"); else sprintf(link, "/proc/self/fd/%d", folder);
  ssize_t n = readlink(link, base, sizeof base - 1);
  if (n < 0) return "";
  base[n] = 0;
  snprintf(into, PATH_MAX, "%s/%s", base, path);
  return into;
}

static const char *of(int fd, char *into) {
  char link[64];
  sprintf(link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, into, PATH_MAX - 1);
  into[n < 0 ? 0 : n] = 0;
  return into;
}

/* 1 where the event is to fail, with errno set. */
static int event(void) {
  pthread_mutex_lock(&lock);
  long n = ++events;
  pthread_mutex_unlock(&lock);
  if (!(at > 0 ? n == at : at < 0 && n >= -at)) return 0;
  if (action > 0) { errno = (int)action; return 1; }
  if (action < 0) { raise((int)-action); }
  return 0;
}

/* One record: the kind, the inode, the offset, the lengths of two names and of data, and these. */
static void note(char kind, unsigned long inode, long offset, const char *a, const char *b, const void *data, long size) {
  if (log_fd < 0) return;
  REAL(writev);
  struct { char kind; char pad[7]; unsigned long inode; long offset, a, b, size; } head =
      {kind, "", inode, offset, (long)strlen(a), (long)strlen(b), size};
  struct iovec parts[] = {{&head, sizeof head}, {(void *)a, head.a}, {(void *)b, head.b}, {(void *)data, size}};
  int kept = errno;
  pthread_mutex_lock(&lock);
  if (real_writev(log_fd, parts, 4) < 0) abort();
  pthread_mutex_unlock(&lock);
  errno = kept;
}

static unsigned long inode_of(int fd) { struct stat s; return fstat(fd, &s) ? 0 : s.st_ino; }

static int opened(int folder, const char *path, int flags, mode_t mode) {
  REAL(openat);
  char into[PATH_MAX];
  const char *name = whole(folder, path, into);
  int changes = flags & (O_CREAT | O_TRUNC) && flags & (O_WRONLY | O_RDWR) && inside(name);
  if (!changes) return real_openat(folder, path, flags, mode);
  struct stat before;
  int there = !stat(name, &before);
  if (there && !(flags & O_TRUNC)) return real_openat(folder, path, flags, mode);
  if (event()) return -1;
  int fd = real_openat(folder, path, flags, mode);
  if (fd >= 0) note(there ? 'T' : 'C', inode_of(fd), 0, name, "", 0, 0);
  return fd;
}

#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list l; va_start(l, flags); mode = va_arg(l, int); va_end(l); }
int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }

static int tracked(int fd, char *into) { return *root && fd > 2 && fd != log_fd && inside(of(fd, into)); }

ssize_t write(int fd, const void *data, size_t size) {
  REAL(write);
  char name[PATH_MAX];
  if (!tracked(fd, name)) return real_write(fd, data, size);
  if (event()) return -1;
  long offset = fcntl(fd, F_GETFL) & O_APPEND ? lseek(fd, 0, SEEK_END) : lseek(fd, 0, SEEK_CUR);
  ssize_t n = real_write(fd, data, size);
  if (n > 0) note('W', inode_of(fd), offset, name, "", data, n);
  return n;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
  REAL(pwrite);
  char name[PATH_MAX];
  if (!tracked(fd, name)) return real_pwrite(fd, data, size, offset);
  if (event()) return -1;
  ssize_t n = real_pwrite(fd, data, size, offset);
  if (n > 0) note('W', inode_of(fd), offset, name, "", data, n);
  return n;
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(writev);
  char name[PATH_MAX];
  if (!tracked(fd, name)) return real_writev(fd, parts, count);
  ssize_t all = 0;
  for (int i = 0; i < count; i++) {
    ssize_t n = parts[i].iov_len ? write(fd, parts[i].iov_base, parts[i].iov_len) : 0;
    if (n < 0) return all ? all : n;
    all += n;
    if ((size_t)n < parts[i].iov_len) break;
  }
  return all;
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
  REAL(fwrite);
  char name[PATH_MAX];
  int fd = *root ? fileno(file) : -1;
  if (fd < 0 || !tracked(fd, name)) return real_fwrite(data, size, count, file);
  if (event()) return 0;
  fflush(file);
  long offset = lseek(fd, 0, SEEK_CUR);
  size_t n = real_fwrite(data, size, count, file);
  fflush(file);
  if (n) note('W', inode_of(fd), offset, name, "", data, (long)(n * size));
  return n;
}

ssize_t sendfile(int out, int in, off_t *offset, size_t count) {
  REAL(sendfile);
  char name[PATH_MAX];
  if (tracked(out, name)) { errno = ENOSYS; return -1; } /* who copies falls back on write */
  return real_sendfile(out, in, offset, count);
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t count) { return sendfile(out, in, (off_t *)offset, count); }

static int synced(int fd, int (*call)(int)) {
  char name[PATH_MAX];
  if (!tracked(fd, name)) return call(fd);
  if (event()) return -1;
  struct stat s;
  int done = call(fd);
  if (!done && !fstat(fd, &s)) note(S_ISDIR(s.st_mode) ? 'D' : 'S', s.st_ino, 0, name, "", 0, 0);
  return done;
}
int fsync(int fd) { REAL(fsync); return synced(fd, real_fsync); }
int fdatasync(int fd) { REAL(fdatasync); return synced(fd, real_fdatasync); }

int ftruncate(int fd, off_t size) {
  REAL(ftruncate);
  char name[PATH_MAX];
  if (!tracked(fd, name)) return real_ftruncate(fd, size);
  if (event()) return -1;
  int done = real_ftruncate(fd, size);
  if (!done) note('T', inode_of(fd), size, name, "", 0, 0);
  return done;
}
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }

#define TWO(kind, from, to, call) \
  char one[PATH_MAX], two[PATH_MAX]; const char *a = from, *b = to; \
  if (!inside(a) && !inside(b)) return call; \
  if (event()) return -1; \
  int done = call; if (!done) note(kind, 0, 0, a, b, 0, 0); return done;
int rename(const char *p, const char *q) { REAL(rename); TWO('R', whole(AT_FDCWD, p, one), whole(AT_FDCWD, q, two), real_rename(p, q)) }
int renameat(int d, const char *p, int e, const char *q) { REAL(renameat); TWO('R', whole(d, p, one), whole(e, q, two), real_renameat(d, p, e, q)) }
int link(const char *p, const char *q) { REAL(link); TWO('L', whole(AT_FDCWD, p, one), whole(AT_FDCWD, q, two), real_link(p, q)) }

#define ONE(kind, path, call) \
  char one[PATH_MAX]; const char *a = path; \
  if (!inside(a)) return call; \
  if (event()) return -1; \
  int done = call; if (!done) note(kind, 0, 0, a, "", 0, 0); return done;
int unlink(const char *p) { REAL(unlink); ONE('U', whole(AT_FDCWD, p, one), real_unlink(p)) }
int unlinkat(int d, const char *p, int f) { REAL(unlinkat); ONE('U', whole(d, p, one), real_unlinkat(d, p, f)) }
int rmdir(const char *p) { REAL(rmdir); ONE('U', whole(AT_FDCWD, p, one), real_rmdir(p)) }
int mkdir(const char *p, mode_t m) { REAL(mkdir); ONE('M', whole(AT_FDCWD, p, one), real_mkdir(p, m)) }
int mkdirat(int d, const char *p, mode_t m) { REAL(mkdirat); ONE('M', whole(d, p, one), real_mkdirat(d, p, m)) }
