/* A thread that moves one rank's calls on while the rank computes; see mpidl_node.h.
 *
 * Ordering. Calls are moved on by the thread only, one after the other in the order in which they were given. What it
 * wrote of a call, the caller may read once it has seen, under the lock, that the call has ended.
 */
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "include/mpidl_node.h"
#include "node/flags.h"

enum { PATIENCE = 2000000 }; /* nanoseconds, after which the thread looks whether it is to end */

struct mpidl_progress_thread {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t given, ended;
    mpidl_node *node;
    mpidl_job *first, *last;
    bool stopping;
};

static void end_first(mpidl_progress_thread *self, int progress) {
    mpidl_job *job = self->first;
    self->first = job->next;
    job->result = progress;
    job->ended = 1;
    pthread_cond_broadcast(&self->ended);
}

static void *work(void *argument) {
    mpidl_progress_thread *self = argument;
    pthread_mutex_lock(&self->lock);
    while (!self->stopping) {
        if (!self->first) {
            pthread_cond_wait(&self->given, &self->lock);
            continue;
        }
        mpidl_job *job = self->first;
        pthread_mutex_unlock(&self->lock);
        int progress = mpidl_node_advance(self->node, job, PATIENCE);
        pthread_mutex_lock(&self->lock);
        if (progress != MPIDL_WAITING) {
            end_first(self, progress);
        }
    }
    pthread_mutex_unlock(&self->lock);
    return NULL;
}

/* Signals are the business of the program's own threads. */
static int start_thread(mpidl_progress_thread *self) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int status = pthread_create(&self->thread, NULL, work, self);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return status;
}

mpidl_progress_thread *mpidl_progress_thread_start(mpidl_node *node) {
    mpidl_progress_thread *self = calloc(1, sizeof *self);
    if (!self) {
        return NULL;
    }
    self->node = node;
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->given, NULL);
    pthread_cond_init(&self->ended, &clock);
    pthread_condattr_destroy(&clock);
    if (start_thread(self) != 0) {
        free(self);
        return NULL;
    }
    return self;
}

void mpidl_progress_thread_give(mpidl_progress_thread *self, mpidl_job *job) {
    job->next = NULL;
    job->ended = 0;
    pthread_mutex_lock(&self->lock);
    if (self->first) {
        self->last->next = job;
    } else {
        self->first = job;
    }
    self->last = job;
    pthread_cond_signal(&self->given);
    pthread_mutex_unlock(&self->lock);
}

int mpidl_progress_thread_wait(mpidl_progress_thread *self, mpidl_job *job, int64_t patience) {
    int64_t until = nanoseconds_now() + patience;
    struct timespec limit = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};
    pthread_mutex_lock(&self->lock);
    while (!job->ended && patience > 0 && pthread_cond_timedwait(&self->ended, &self->lock, &limit) == 0) {
    }
    int progress = job->ended ? job->result : MPIDL_WAITING;
    pthread_mutex_unlock(&self->lock);
    return progress;
}

void mpidl_progress_thread_stop(mpidl_progress_thread *self) {
    pthread_mutex_lock(&self->lock);
    self->stopping = true;
    pthread_cond_signal(&self->given);
    pthread_mutex_unlock(&self->lock);
    pthread_join(self->thread, NULL);
    pthread_mutex_destroy(&self->lock);
    pthread_cond_destroy(&self->given);
    pthread_cond_destroy(&self->ended);
    free(self);
}
